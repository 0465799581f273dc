"""The learner: scored groups in, one update of the policy out, whatever recipe and family. No Ray in here.

``batch`` checks and stacks what arrives, ``learner`` makes the update, ``metrics`` describes it, ``state`` writes and
reads what a bit-exact resume needs, ``precision`` says when bfloat16 is worth it, ``ranks`` shares an update among
processes, ``memory`` says on paper what it takes, and ``fitting`` cuts an update by that. ``memory`` alone imports no
torch, and neither does this package.
"""
