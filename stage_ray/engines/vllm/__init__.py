"""Image sampling inside vLLM: a plug-in model, guidance as a logits processor, and the engine over both."""
