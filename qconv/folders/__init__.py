"""Folders that qconv writes to: whose they are, and what a run that was killed has left in them.

``ownership`` proves by ledgers which files are qconv's own, so that nothing else is ever overwritten or removed;
``journal`` keeps what a run belongs to and what of it is committed, and locks the folder, ``part`` is what one of
several builds has of it; ``readings`` finds out that a source has changed since units were made of it; ``state`` tells
an empty folder from an unfinished or a finished build and from somebody else's.

Builds, importance matrices, calibration's activations, evaluations and nights all write by these rules.
"""
