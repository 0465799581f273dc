"""The learner: scored groups in, one update of the policy out, whatever recipe and family. No Ray in here.

``batch`` checks and stacks what arrives, ``learner`` makes the update by ``passes``, ``metrics`` describes it,
``state`` writes and reads what a bit-exact resume needs, ``ranks`` shares an update among processes, ``memory`` says on
paper what it takes, and ``fitting`` cuts an update by that. ``memory`` and this package alone import no torch.
"""
