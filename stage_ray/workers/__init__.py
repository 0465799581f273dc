"""Thin Ray actors over the engines, the rewards and the learner. What they do is written elsewhere; how it travels, here.

Payloads are returned from actor methods, so that the driver owns them and they outlive the worker (promise 10).
"""
