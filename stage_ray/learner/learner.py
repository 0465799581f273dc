"""One update, from scored groups to new weights, whatever the recipe (`stage_ray.recipes.base`).

The reference runs once (forward), then the recipe gives credit, then the policy runs once (forward and backward):

* the policy's entropies, which credit may need, are those that the engine recorded while it sampled;
* in a group of the learner's own version the importance ratio is taken against the learner's own detached
  log-probabilities, so it is exactly 1 as in the paper's code, and what lies between engine and learner shows as a
  metric (``mismatch/...``) and not as a gradient. Older groups use the log-probabilities recorded at sampling, with
  ``algorithm.correction`` (see `stage_ray.algorithm.off_policy`).
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stage_ray.config import RunConfig
from stage_ray.config.hub import hub_uri
from stage_ray.files import FileDigest
from stage_ray.learner.batch import Batch, LearnerError, make_batch
from stage_ray.learner.finite import NonFiniteError, blame, train_finite, without_copies
from stage_ray.learner.fitting import choose_cut, naming_memory
from stage_ray.learner.metrics import update_flops, update_metrics
from stage_ray.learner.passes import Passes
from stage_ray.learner.ranks import Ranks, full_state_dict, full_tensor
from stage_ray.learner.schedule import learning_rate
from stage_ray.learner.state import LearnerParts, fingerprint, load_state, save_state
from stage_ray.policies import load_policy
from stage_ray.policies.base import Policy
from stage_ray.policies.devices import compute_dtype, device_for, peak_flops
from stage_ray.policies.lora import Adapters
from stage_ray.policies.reference import check_reference, naming_reference, reference_config
from stage_ray.pretrained import base_location, export_checkpoint
from stage_ray.recipes import load_recipe
from stage_ray.recipes.base import Credit, ReferenceOutputs
from stage_ray.records import RolloutGroup, ScoredGroup
from stage_ray.samplers import training_search
from stage_ray.weights.adjacent import lay_out

CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Learner:
    """Trains the policy of a run; float32 master weights, the frozen reference beside them.

    Invariants: ``version`` is the number of updates done; an update that raises has changed nothing. The same groups
    and the same state give the same bits on a CPU with the same number of threads.

    Example:
        learner = Learner(run, threads=1)
        metrics = learner.update(groups, scored)
        manifest, chunks = pack(learner.version, learner.weights())
    """

    def __init__(self, run: RunConfig, threads: int | None = None, ranks: Ranks | None = None) -> None:
        """Load the policy, keep this rank's share of it, then the same for the reference.

        Seeds torch's generators, and with ``threads`` sets its threads, process-wide.

        Raises:
            ConfigError: ``policy.*`` leads to no usable model, ``recipe`` and ``algorithm`` to no recipe, or no cut of
                an update fits memory (`choose_cut`).
        """
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(run.seed)
        self.version = 0
        self._run = run
        self._recipe, self._search = load_recipe(run), training_search(run)
        self._ranks = ranks or Ranks()
        self._device = device_for(run.learner.gpus, "learner.gpus")
        # Where the hardware does not compute in bfloat16 it is emulated and slow, so auto is float32 there.
        autocast, wanted = run.learner.autocast, run.learner.reference_dtype
        self._bfloat16 = autocast != "off" and compute_dtype(autocast, self._device) is torch.bfloat16
        self._reference_bfloat16 = self._bfloat16 if wanted == "auto" else wanted == "bfloat16"
        self._base_bfloat16 = self._bfloat16 and wanted != "float32"  # what adapters stand beside
        if run.policy.lora is not None:  # the reference is the policy itself, and computed alike
            self._reference_bfloat16 = self._bfloat16
        check_reference(run.policy, fetch=True)
        # One is cut before the other is loaded, each from the machine's memory: no GPU ever holds a whole one.
        self.policy = load_policy(run.policy, device=CPU)
        self._codebook = self.policy.codec.codebook().to(self._device)
        narrow = {"bfloat16": self._bfloat16, "reference_bfloat16": self._reference_bfloat16}
        self._cut = choose_cut(run, self.policy.codec, self._ranks, self._device, **narrow)
        if self._cut[1]:
            self.policy.enable_gradient_checkpointing()
        self._reference, base = self._load_models()
        self._parameters = self.policy.trained_parameters()
        if self._ranks.count == 1:
            lay_out(self._parameters.values())
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=run.learner.lr,
            betas=run.learner.betas,
            weight_decay=run.learner.weight_decay,
            fused=True,
        )
        self._state = LearnerParts(
            self._parameters, self._optimizer, base, self._reference.trained_parameters(), self._ranks
        )
        self._refreshed = False  # whether the reference is another one than the run began with
        self._passes = Passes(run, self._recipe, (self.policy, self._reference), self._ranks, **narrow)
        self._release_cached_memory()

    def update(self, groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup]) -> dict[str, float]:
        """Train on whole groups once, with their scores in the same order, and move to the next version.

        Where a run trains through a search, groups are of candidates, and those that it keeps are trained on.

        Returns:
            The metrics of `update_metrics`, gradient norm, learning rate, seconds, and how many groups were left out
            because of a value that is not finite.

        Raises:
            LearnerError: groups that must not be trained on, a loss or gradient that is not finite (whichever groups
                are left out), too little memory, or a mismatch between engine and learner beyond
                ``learner.max_mismatch``. No weight has changed then.
        """
        if self._search is None:
            return train_finite(self._train, groups, scored, self._ranks.count)
        kept = [self._search.kept(group, scores) for group, scores in zip(groups, scored, strict=True)]
        few = [scores for _, scores in kept]
        gain = statistics.fmean(map(self._search.gain, scored, few))
        metrics = train_finite(self._train, [group for group, _ in kept], few, self._ranks.count)
        return metrics | {"search/gain": gain}

    def _train(self, groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup], copies: int) -> dict[str, float]:
        """Train on all these groups; the last of them may be ``copies`` which count in metrics alone."""
        batch = make_batch(
            groups,
            scored,
            run=self._run,
            version=self.version,
            policy=self.policy,
            codebook=self._codebook,
            device=self._device,
        )
        # This rank runs the images of its own groups, as many as every other rank; the recipe sees all groups.
        own_groups = self._ranks.rows(len(groups))
        micro_batches = batch.micro_batches(self._cut[0], own_groups)
        seconds: dict[str, float] = {}
        # In bfloat16 on a CPU torch's fused attention is the slower one: its backward took a third of an update. Policy
        # and reference, forward and backward (which may recompute the forward) do the same, so that all round alike.
        # A backbone that casts to float32 itself chooses again.
        by_matrices = self._bfloat16 and self._device.type == "cpu"
        with (
            naming_memory(f"update {self.version}", self._run.learner, self._cut, bfloat16=self._bfloat16),
            sdpa_kernel(SDPBackend.MATH) if by_matrices else nullcontext(),
        ):
            with self._clock(seconds, "time/reference_s"):
                if offload := self._run.learner.reference_offload:
                    self._reference.model.to(self._device)
                reference = self._passes.reference(batch, micro_batches)
                if offload:
                    self._reference.model.to(CPU)
            credit = without_copies(self._recipe.credit(batch, reference, self.version), copies)
            with self._clock(seconds, "time/policy_s"):
                if self._run.learner.several_updates:
                    metrics = self._several_updates(batch, micro_batches, reference, credit, copies)
                else:
                    outputs = self._passes.policy(batch, micro_batches, reference, credit)
                    metrics = update_metrics(batch, reference, credit, outputs, self._run)
                    find = partial(blame, reference, credit, outputs, self._run)
                    metrics |= self._step(outputs.sums["loss"], metrics, find)
        self.version += 1
        if self.version in self._run.algorithm.reference_refresh:
            self._refresh_reference()
        self._release_cached_memory()
        peak = peak_flops(self._device, torch.bfloat16 if self._bfloat16 else torch.float32)
        if peak is not None and (sizes := self.policy.codec.sizes()) is not None:
            flops = update_flops(batch, sizes, self._run.learner, adapters=self.policy.adapters is not None)
            metrics["mfu/learner"] = flops / (sum(seconds.values()) * peak * self._ranks.count)  # over all ranks
        return metrics | seconds

    def _several_updates(
        self, batch: Batch, micro_batches: Sequence[Tensor], reference: ReferenceOutputs, credit: Credit, copies: int
    ) -> dict[str, float]:
        """``updates_per_batch`` passes over mini-batches of whole groups, an optimizer step each.

        Ratios (but those of older groups) and metrics are of the policy before the first one; losses and gradient norms
        are means. A mini-batch after the first that is not finite is left out.
        """
        batch, outputs = self._passes.start(batch, micro_batches)
        metrics = update_metrics(batch, reference, credit, outputs, self._run)
        learner, told = self._run.learner, list[dict[str, float]]()
        parts = torch.arange(len(batch.groups)).split(learner.groups_per_update or len(batch.groups))
        for number, part in enumerate(parts * learner.updates_per_batch):
            some, theirs = batch.select(part), reference.select(part)
            last = copies if part is parts[-1] else 0  # copies are the last groups of the batch
            mine = without_copies(self._recipe.credit(some, theirs, self.version), last)
            own = some.micro_batches(self._cut[0], self._ranks.rows(len(part)))
            outputs = self._passes.policy(some, own, theirs, mine)
            find = partial(blame, theirs, mine, outputs, self._run)
            try:
                told.append(outputs.sums | self._step(outputs.sums["loss"], metrics, find))
            except NonFiniteError as error:
                if number == 0:  # nothing has changed yet
                    raise NonFiniteError(str(error), {int(part[n]): why for n, why in error.blamed.items()}) from error
                log.warning("%s; mini-batch %d is left out", error, number + 1)
        return metrics | {name: statistics.fmean(row[name] for row in told) for name in told[0]}

    def drift(self, groups: Sequence[RolloutGroup], images: int) -> list[np.ndarray]:
        """How far the policy has moved from the reference, on the first ``images`` of each group.

        Means over tokens of `stage_ray.policies.drift.token_drift`, float32 [images, 3 or 6] each. Several ranks call
        it together.
        """
        encode = self.policy.codec.encode_prompt
        prompts = [
            prompt for group in groups for prompt in [encode(group.prompt.drawn_text)] * len(group.tokens[:images])
        ]
        tokens = torch.as_tensor(np.concatenate([group.tokens[:images] for group in groups]), dtype=torch.int64)
        if offload := self._run.learner.reference_offload:
            self._reference.model.to(self._device)
        found = self._passes.drift(prompts, tokens, self._cut[0]).numpy()
        if offload:
            self._reference.model.to(CPU)
        self._release_cached_memory()
        sizes = np.cumsum([len(group.tokens[:images]) for group in groups])
        return np.split(found, sizes[:-1])

    def weights(self, dtype: torch.dtype | None = None) -> list[tuple[str, Tensor]]:
        """The trained parameters by ``state_dict`` name, detached; adapters merged into the weights beside them.

        A single rank's are float32 and share memory with the live ones: pack or copy them before the next update.
        Several ranks gather them together on the CPU, cast to ``dtype``; all but the first then return nothing. What is
        merged is also new, on the CPU, and cast.
        """
        adapters = self.policy.adapters
        if self._ranks.count == 1 and adapters is None:
            return [(name, parameter.detach()) for name, parameter in self._parameters.items()]
        whole = self._parameters.items() if adapters is None else adapters.merged(full_tensor)
        weights = list(full_state_dict(whole, keep=self._ranks.first, dtype=dtype).items())
        self._release_cached_memory()
        return weights

    def save_state(self, directory: Path) -> dict[str, FileDigest]:
        """Write all that a bit-exact resume needs (safetensors and JSON) into ``directory``, together; the shards."""
        return save_state(directory, self.version, self._state, refreshed=self._refreshed)

    def load_state(self, directory: Path) -> None:
        """Go on from what `save_state` wrote.

        Raises:
            LearnerError: a file is missing or damaged, or of another model. Nothing has changed then.
        """
        self.version, refreshed = load_state(directory, self._state)
        self._refreshed |= refreshed
        self._release_cached_memory()

    def export(self, directory: Path) -> None:
        """Write a Hugging Face checkpoint that plain transformers loads; the first rank does, the others take part.

        Of adapters, as ``policy.lora.export`` says, what merges them or what peft loads.
        """
        if self.policy.adapters is not None:
            self._export_adapters(self.policy.adapters, directory)
        else:
            parameters = self._parameters.items()
            state = None if self._ranks.count == 1 else full_state_dict(parameters, keep=self._ranks.first)
            if self._ranks.first:
                self.policy.save(directory, state, self._export_dtype)
        self._ranks.wait()

    def _export_adapters(self, adapters: Adapters, directory: Path) -> None:
        codec, uri = self.policy.codec, hub_uri(base_location(self._run.policy.path))
        if adapters.config.export == "adapters":
            base, revision = (str(codec.location.absolute()), None) if uri is None else (uri.id, uri.revision)
            adapters.save(directory, base, revision, full_tensor, keep=self._ranks.first)
            return
        # Added to the checkpoint's own numbers, which the base here may have rounded.
        deltas = full_state_dict(adapters.deltas(full_tensor), keep=self._ranks.first)
        if self._ranks.first:
            texts, dtype = codec.texts(), self._export_dtype
            export_checkpoint(codec.location, directory, deltas, added=True, texts=texts, dtype=dtype)

    @property
    def _export_dtype(self) -> torch.dtype | None:
        wanted = self._run.policy.export_dtype
        return None if wanted == "checkpoint" else getattr(torch, wanted)

    def _load_models(self) -> tuple[Policy, str]:
        """Keep this rank's share of the policy, then of the reference; the latter, and `_load_reference`'s fingerprint.

        With adapters the reference is the policy without them: no parameter is there twice.
        """
        adapters, base = self.policy.adapters, ""
        if adapters is not None:
            base = fingerprint(dict(adapters.base_parameters()))
            if self._base_bfloat16:
                _round_frozen(self.policy)
        self._keep_share(self.policy, bfloat16=self._bfloat16)
        return self._load_reference() if adapters is None else (adapters.without(), base)

    def _load_reference(self) -> tuple[Policy, str]:
        """The reference, of which this rank keeps its share, and its `fingerprint` from while it is whole."""
        with naming_reference(self._run.policy):
            reference = load_policy(reference_config(self._run.policy), device=CPU)
        base = fingerprint(reference.trained_parameters())
        reference.model.requires_grad_(False)
        if self._reference_bfloat16:
            _round_frozen(reference)
        self._keep_share(reference, bfloat16=self._reference_bfloat16)
        if self._run.learner.reference_offload:
            reference.model.to(CPU)
        return reference, base

    @torch.no_grad()
    def _refresh_reference(self) -> None:
        """Let the reference be the policy as it is now; it keeps its own dtype and device."""
        self._ranks.reshard(self._reference.fsdp_modules())  # what its last pass left whole is gathered anew
        for name, parameter in self._state.reference_parameters.items():
            parameter.copy_(self._parameters[name])
        self._refreshed = True

    def _keep_share(self, policy: Policy, *, bfloat16: bool) -> None:
        """Move this rank's share of a whole model to its device, layer by layer; all of it where it is alone."""
        policy.drop_image_decoder()
        modules, inside = policy.fsdp_modules(), set(policy.backbone.modules())
        self._ranks.shard(modules, bfloat16, exact=set(modules) - inside)  # a head gives logits in float32
        policy.model.to(self._device)

    def _release_cached_memory(self) -> None:
        """Release torch's cached memory on a GPU that an engine shares: the engine allocates from it next."""
        if self._run.rollout.colocated and self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _clock(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Measure what runs inside, the GPU's work included."""
        start = self._now()
        yield
        seconds[name] = self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _step(
        self, loss: float, metrics: Mapping[str, float], blame: Callable[[], Mapping[int, str]] = dict
    ) -> dict[str, float]:
        """Check, clip and step; the learning rate, and the gradient norm before clipping.

        ``blame`` finds the groups that made a loss or gradient other than finite.
        """
        # Parameters that no token reached have no gradient.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))  # over the shards of all ranks
        where = f"update {self.version}"
        # Every check precedes the first change of a weight.
        for name, value in (("loss", loss), ("gradient norm", norm.item())):
            if not math.isfinite(value):
                self._optimizer.zero_grad(set_to_none=True)
                text = f"{where}: the {name} is {value}; no weight was changed. Try a lower learner.lr"
                raise NonFiniteError(text, blame())
        bound, mismatch = self._run.learner.max_mismatch, metrics.get("mismatch/abs_logprob", 0.0)
        # With older groups the difference includes the policy's own drift.
        if bound is not None and self._run.pipeline.max_staleness == 0 and mismatch > bound:
            self._optimizer.zero_grad(set_to_none=True)
            raise LearnerError(
                f"{where}: rollout and learner differ by {mismatch:.3g} nats a token on average, "
                f"learner.max_mismatch is {bound}; does the engine hold other weights than the learner?"
            )
        lr = learning_rate(self.version, self._run.steps, self._run.learner)
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._run.learner.max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"lr": lr, "grad_norm": norm.item()}


def _round_frozen(policy: Policy) -> None:
    """Keep frozen matrices of layers in bfloat16: autocast rounds them anyway, but neither norms nor embeddings."""
    for module in nn.ModuleList(policy.backbone.layers).modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)
