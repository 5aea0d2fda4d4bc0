"""What chooses is not what is reported."""

from dclip_qdrant.pairs import Pairs
from dclip_qdrant.training.distributed import Comm
from dclip_qdrant.training.evaluate import EvalSet
from dclip_qdrant.training.run import Run
from dclip_qdrant.training.worker import Worker


def test_halves_of_a_split_are_disjoint_and_whole(pairs_folder):
    pairs = Pairs.open(str(pairs_folder))
    whole, first, second = (EvalSet(pairs, "val", None, half=half).captions for half in (None, 0, 1))
    assert len(whole) == 10
    assert (first, second) == (whole[0::2], whole[1::2])


def test_without_a_test_split_the_table_is_measured_on_the_half_that_chose_nothing(pairs_folder):
    worker = Worker(Comm(), "cpu", lambda line: None)
    worker.measures.eval_set = lambda run, split, most=None, half=None: (split, half)

    def sets(split):
        run = Run("student", "", {}, {}, 0, "base", "base", str(pairs_folder), "", split=split)
        return worker.measures.choosing(run), worker.measures.reported(run)

    assert sets("test") == (("val", None), ("test", None))
    assert sets("val") == (("val", 0), ("val", 1))
