"""Thin Ray actors over the engines, the rewards and the learner: how the work travels, not what it is.

Payloads are returned from actor methods, so that the driver owns them and they outlive the worker (promise 10).
"""
