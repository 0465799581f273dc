"""Janus and Janus-Pro (transformers' ``JanusForConditionalGeneration``) as a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

from stage_ray.config import PolicyConfig
from stage_ray.errors import ConfigError
from stage_ray.policies.base import PromptIds
from stage_ray.policies.janus import files as janus_parts
from stage_ray.policies.janus.files import JanusFiles, JanusPrompts
from stage_ray.policies.logprobs import SamplingParams, TokenLogprobs, chunked_logprobs, process_logits

TRAINED_PREFIX = "model.language_model."
LOGITS_AT_ONCE = 2**22  # float32 logits made at once by `token_logprobs`: 16 MiB, and a few temporaries of that size


class Backbone(nn.Module):
    """Rows of token ids, image tokens in their places, to states: all that is trained, as one module, to be sharded."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, rows: Tensor, image_embeds: Tensor, positions: Tensor) -> Tensor:
        """Ids int64 [B, L], embeddings [B, T - 1, hidden] and where they belong int64 [B, T - 1] -> [B, L, hidden]."""
        embeds = self.language_model.embed_tokens(rows)  # type: ignore[operator]
        places = positions.unsqueeze(-1).expand_as(image_embeds)
        embeds = embeds.scatter(1, places, image_embeds.to(embeds.dtype))
        return self.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state


class JanusPolicy:
    """A Janus model: prompts, teacher-forced statistics, pictures. STAGE trains its language model and nothing else.

    The text head (``lm_head``) plays no part in images; where it is tied to the embeddings it moves with them.
    """

    def __init__(self, model: JanusForConditionalGeneration, files: JanusFiles, prompts: JanusPrompts) -> None:
        self.model = model
        self.image_tokens = files.image_tokens
        self.codebook_size = files.codebook_size
        self._files = files
        self._prompts = prompts
        self._pad = int(files.processor.tokenizer.pad_token_id)
        model.model.generation_head.float()  # see `head`
        self._backbone = Backbone(model.model.language_model)
        model.requires_grad_(False)
        for parameter in self.trained_parameters().values():
            parameter.requires_grad_(True)

    @classmethod
    def load(cls, config: PolicyConfig, *, device: torch.device, dtype: torch.dtype = torch.float32) -> JanusPolicy:
        """Load a checkpoint with plain transformers; dropout off, language model trainable, the rest frozen.

        Raises:
            ConfigError: missing or damaged files, another architecture, or tensors the checkpoint lacks.
        """
        files = JanusFiles.load(config)
        try:
            model, report = JanusForConditionalGeneration.from_pretrained(
                files.location, dtype=dtype, output_loading_info=True, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"policy.path: {files.location} does not load as a Janus model: {error}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise ConfigError(f"policy.path: {files.location} lacks {len(missing)} tensors, the first is {missing[0]}")
        return cls(model.to(device).eval(), files, JanusPrompts(files, config.template))

    def encode_prompt(self, text: str) -> PromptIds:
        """Prompt to token ids of both branches, chat template applied, ending in the token that begins an image."""
        return self._prompts.encode(text)

    def hidden_states(self, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """Language-model states that predict the image tokens: tokens int64 [B, T] -> float [B, T, hidden].

        Each row is its prompt, then its image tokens but the last, then padding. Attention is causal, so padding on the
        right changes nothing and needs no mask.

        Raises:
            ValueError: as many prompts as rows of tokens are needed, none empty.
        """
        if len(prompts) != tokens.shape[0] or min(map(len, prompts), default=0) < 1:
            raise ValueError(f"{len(prompts)} prompts for {tokens.shape[0]} images; one each is needed, none empty")
        device, length = tokens.device, tokens.shape[1]
        longest = max(map(len, prompts))
        rows = [[*prompt, *[self._pad] * (longest + length - 1 - len(prompt))] for prompt in prompts]
        starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        image_embeds = self.model.prepare_embeddings_for_image_generation(tokens[:, :-1])
        positions = starts[:, None] + torch.arange(length - 1, device=device)
        states = self._backbone(torch.tensor(rows, device=device), image_embeds, positions)
        predicting = (starts[:, None] - 1 + torch.arange(length, device=device)).unsqueeze(-1)
        return states.gather(1, predicting.expand(-1, -1, states.shape[-1]))

    def image_logits(self, prompts: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """Teacher-forced logits of the image tokens: tokens int64 [B, T] -> float [B, T, V]."""
        return self.head(self.hidden_states(prompts, tokens))

    def head(self, states: Tensor) -> Tensor:
        """States [..., hidden] -> logits float32 [..., V], in float32 even where the rest runs in bfloat16.

        A logit of 10 in bfloat16 is off by up to 0.03, which is what engine and learner would then differ by.
        """
        with torch.autocast(states.device.type, enabled=False):
            return self.model.model.generation_head(states.float())

    def token_logprobs(
        self, prompts: Sequence[Sequence[int]], tokens: Tensor, *, entropy_grad: bool = True
    ) -> TokenLogprobs:
        """Log-probability and entropy of each token at temperature 1, float32 [B, T].

        Differentiable, the entropy only with ``entropy_grad``, which costs a second run of the head. However large the
        batch, no more than `LOGITS_AT_ONCE` logits are held.
        """
        return self._token_logprobs(self.hidden_states(prompts, tokens), tokens, entropy_grad)

    def guided_token_logprobs(
        self, prompts: Sequence[PromptIds], tokens: Tensor, rule: SamplingParams, *, entropy_grad: bool = True
    ) -> TokenLogprobs:
        """`token_logprobs` of the conditional branch, and each token's log p under what ``rule`` draws from.

        The latter, float32 [B, T], carries no gradient and is minus infinity for a token that top-k or top-p now leaves
        out. One forward of the language model a branch: the conditional states serve both.
        """
        states = self.hidden_states([prompt.conditional for prompt in prompts], tokens)
        plain = self._token_logprobs(states, tokens, entropy_grad)
        with torch.no_grad():
            branches = [states]
            if rule.guided:
                branches.append(self.hidden_states([prompt.unconditional for prompt in prompts], tokens))

            def guided(rows: Tensor) -> Tensor:
                logits = self.head(rows)  # [rows, branches, V]
                return process_logits(logits[:, 0], logits[:, 1] if rule.guided else None, rule)

            rows = self._rows_at_once(len(branches))
            found = chunked_logprobs(torch.stack(branches, dim=2), tokens, guided, rows=rows)
        return TokenLogprobs(plain.logprobs, plain.entropy, found.logprobs)

    def _token_logprobs(self, states: Tensor, tokens: Tensor, entropy_grad: bool) -> TokenLogprobs:
        return chunked_logprobs(states, tokens, self.head, rows=self._rows_at_once(), entropy_grad=entropy_grad)

    def _rows_at_once(self, branches: int = 1) -> int:
        return max(1, LOGITS_AT_ONCE // (branches * self.codebook_size))

    def codebook(self) -> Tensor:
        """Codebook vectors as the image decoder gets them, float32 [V, D] of unit length."""
        return janus_parts.codebook(self.model.model.vqmodel)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> images uint8 [B, H, W, 3]."""
        return janus_parts.decode(self.model.model.vqmodel, tokens)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The language model's parameters by ``state_dict`` name, each once (a tied text head is not named again)."""
        return {name: parameter for name, parameter in self.model.named_parameters() if name.startswith(TRAINED_PREFIX)}

    def fsdp_modules(self) -> list[nn.Module]:
        """What is gathered at once where the model is sharded: each layer, then the whole, which keeps the rest."""
        return [*self._backbone.language_model.layers, self._backbone]  # type: ignore[misc]

    def save(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write weights (``state`` in their place where the model is sharded), configs, tokenizer and template."""
        self.model.save_pretrained(directory, state_dict=dict(state) if state is not None else None)
        self._files.processor.save_pretrained(directory)
