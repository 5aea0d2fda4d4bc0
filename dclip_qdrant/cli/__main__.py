from dclip_qdrant.cli import program

program()
