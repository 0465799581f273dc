"""The learner: scored groups in, one update of the policy out, whatever recipe and family. No Ray in here.

``batch`` checks and stacks what arrives, ``learner`` makes the update, ``metrics`` describes it, ``state`` writes and
reads what a bit-exact resume needs, ``precision`` says when bfloat16 is worth it, ``ranks`` shares an update among
processes, and ``memory`` says on paper what it takes; the latter alone imports no torch, and so does this package.
"""
