"""Whether a build is worse than its reference, how sure that is, and where: measuring, statistics, gates.

``run`` measures a suite's tasks (``text_task``, ``humaneval``) on one of ``engines`` and keeps a ``record`` in a
``run_folder``; ``reference`` and ``cache`` keep what it is compared with; ``divergence``, ``metrics`` and
``statistics`` are the numbers, ``gates`` and ``judging`` the verdict; ``blame`` names layers and experts; ``history``
remembers, and ``report`` shows. Programs that a model wrote run in ``sandbox``.
"""
