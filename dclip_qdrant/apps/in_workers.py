"""Imported by the fork server of an app that registered a student: the embedding workers that it forks know
it too."""

from dclip_qdrant.apps.registration import register_environment

register_environment()
