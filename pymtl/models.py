"""One input, several heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pymtl import ops, reference
from pymtl.crf import CRFLoss
from pymtl.custom import is_module_name, runs_own_code
from pymtl.decoder import DecoderHead, Memory
from pymtl.dropout import dropout
from pymtl.exported_decoder import memory_tensors
from pymtl.generation import generate, go_on, why_not_on
from pymtl.heads import CRFHead, CTCHead, Head
from pymtl.language_model import LanguageModelHead
from pymtl.losses import CrossEntropy, Loss
from pymtl.ops.autograd import is_exporting, is_plain, needs_reference, wants_gradient
from pymtl.ops.late_errors import late_errors_about
from pymtl.packing import as_lengths, same_packing
from pymtl.recurrent import Recurrent
from pymtl.recurrent.route import refuse_recording
from pymtl.serving.generation import MAX_LENGTH, Hypothesis, Search, check_limits
from pymtl.sharing import HardSharing, Sharing, SharingResult
from pymtl.states import States

Field = Tensor | PackedSequence
Input = Field | Mapping[str, Field]


class Logits(dict[str, Tensor | PackedSequence | Memory]):
    """The logits of each task, and what the loss needs besides.

    ``penalties``: of the sharing scheme, weighted scalars by name; empty in evaluation. ``states``: those that each
    task's head reads, for methods that look at their gradients; ``shared``: the same where all tasks of the call read
    one, empty if each task has its own.
    """

    penalties: dict[str, Tensor]
    states: dict[str, tuple[Tensor, ...]]
    shared: tuple[Tensor, ...]

    def __init__(self, logits: Mapping[str, Tensor | PackedSequence | Memory]) -> None:
        super().__init__(logits)
        self.penalties = {}
        self.states = {}
        self.shared = ()


class MultiTaskModel(nn.Module):
    """An embedding, an encoder that the tasks share in one way or another, and a head for each task.

    Everything runs on packed tokens: the embedding, the encoder, the heads and, given PackedSequence targets,
    the loss never see padding. The token heads' weights are stacked into one projection; under hard sharing, where no
    gradient is wanted, it is part of the last layer's time loop.

    Args:
        embedding: from token ids to [..., E] features, applied to packed ids [N], or to a dictionary of packed fields
            if the input is one (:class:`pymtl.TokenFeatures`); None if the input holds features already.
        encoder: a :class:`pymtl.LSTM`, GRU or RNN for all tasks (hard sharing, Caruana 1997), or a
            :class:`pymtl.sharing.Sharing`; its ``batch_first`` says how padded input and output are laid out.
        heads: a head for each task.
        dropout: applied, in training, to the embedded tokens and to the encoder's states; a head that pools by "max"
            takes the maximum of the states as they are, and dropout is applied to that.
        variational: whether all tokens of a sequence share one mask (Gal & Ghahramani 2016, "A Theoretically Grounded
            Application of Dropout in Recurrent Neural Networks"), rather than each having its own.

    Raises:
        TypeError: the encoder is neither, or a head not a :class:`pymtl.Head`.
        ValueError: there is no head, a name is not fit for a module, ``dropout`` is not from 0 to 1, the encoder has
            ``reverse=True`` or shares among other tasks, or a head reads after one that is missing or waits for it in
            turn.
    """

    def __init__(
        self,
        embedding: nn.Module | None,
        encoder: Recurrent | Sharing,
        heads: Mapping[str, Head],
        dropout: float = 0.0,
        variational: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, Recurrent | Sharing):
            raise TypeError(
                f"encoder: expected a pymtl.LSTM, GRU or RNN (pymtl.convert makes them) or a pymtl.sharing.Sharing, "
                f"got {type(encoder).__name__}"
            )
        layers = [module for module in encoder.modules() if isinstance(module, Recurrent)]
        if any(layer._pymtl_variants.reverse for layer in layers):
            raise ValueError("encoder: expected one that reads from the first token, got reverse=True")
        if not heads:
            raise ValueError("heads: expected at least one head, got none")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout}")
        self.embedding = embedding
        self.encoder = encoder
        self.dropout = float(dropout)
        self.variational = variational
        self.heads = nn.ModuleDict()
        if isinstance(encoder, Sharing) and set(encoder.tasks) != set(heads):
            raise ValueError(f"encoder: expected sharing among the tasks {list(heads)}, got {list(encoder.tasks)}")
        for task, head in heads.items():
            if not isinstance(head, Head):
                raise TypeError(f"heads[{task!r}]: expected a pymtl head, got {type(head).__name__}")
            if not is_module_name(task):
                raise ValueError(f"heads: expected a task name fit for a module, got {task!r}")
        self._order = _reading_order(heads)
        like = next(encoder.parameters())
        for task, head in heads.items():
            if isinstance(encoder, Sharing):
                features = encoder.features_of(task)
            else:
                features = (2 if encoder.bidirectional else 1) * (encoder.proj_size or encoder.hidden_size)
            if isinstance(head, LanguageModelHead):
                self._check_language_model(task)
                head.directions = 2 if encoder.bidirectional else 1
            try:
                if head.reads.skip or head.reads.after is not None:
                    before = None if head.reads.after is None else heads[head.reads.after]
                    head.materialize(features, like, encoder.input_size, before)
                else:
                    head.materialize(features, like)
            except ValueError as error:
                raise ValueError(f"heads[{task!r}]: {error}") from None
            if isinstance(head, CRFHead):
                head.crf.batch_first = encoder.batch_first
            if isinstance(head, CTCHead):
                head.loss = replace(head.loss, batch_first=encoder.batch_first)
            self.heads[task] = head

    @property
    def losses(self) -> dict[str, Loss]:
        """The loss of each head, for :class:`pymtl.JointLoss`."""
        return {task: head.loss for task, head in self.heads.items()}

    def forward(
        self,
        inputs: Input,
        lengths: Tensor | Sequence[int] | None = None,
        tasks: Sequence[str] | None = None,
        targets: Mapping[str, Field] | None = None,
        sources: Mapping[str, Field] | None = None,
    ) -> Logits:
        """The logits of the tasks.

        Args:
            inputs: token ids [B, T] ([T, B] without ``batch_first``), or features [B, T, E] if there is no
                embedding; or a PackedSequence of either; or a dictionary of such fields, all packed or all padded
                alike, for an embedding of several.
            lengths: of the sequences, in any order: int64 [B] or integers from 1 to T; None if all are T long. Those on
                a GPU are waited for.
            tasks: those wanted; all by default.
            targets: in training, of each :class:`pymtl.DecoderHead`'s task, as int64 [B, S] or packed; others are not
                looked at.
            sources: of each decoder that copies, what each token of the input is among its classes, int64, laid out as
                the input; see :class:`pymtl.DecoderHead`.

        Returns:
            For each task, [B, C] for a head of sequences; for a head of tokens [B, T, C] ([T, B, C] without
            ``batch_first``), zero at padding, or a PackedSequence [N, C] if the input is one. For a decoder [B, S, C],
            or a PackedSequence, as its targets are; a :class:`pymtl.decoder.Memory` where it has none. Under
            torch.export a plain dictionary, which has ``NAME/keys``, ``NAME/values``, ``NAME/batch_sizes``,
            ``NAME/places``, ``NAME/h`` and of an LSTM ``NAME/c`` for a decoder; see :func:`pymtl.export_step`.

        Raises:
            KeyError: a task is unknown.
            IndexError: a decoder's target is no class. On a GPU a later loss raises it.
            TypeError: a decoder's targets are no integers, or ``targets`` or ``sources`` no dictionary.
            ValueError: the rank of the input does not fit, fields differ in their packing, ``lengths`` comes with a
                PackedSequence, a decoder's targets are of another number of sequences, or there are targets or
                sources under torch.export.
            RuntimeError: a size, dtype or device does not fit.
        """
        refuse_recording("a MultiTaskModel", "it packs its tokens by operators of pymtl; torch.export.export can")
        wanted = tuple(self.heads) if tasks is None else tuple(dict.fromkeys(tasks))
        if not wanted:
            raise ValueError("tasks: expected at least one task, got none")
        for task in wanted:
            if task not in self.heads:
                raise KeyError(f"tasks: unknown task {task!r}, expected one of {list(self.heads)}")
        for name, given in (("targets", targets), ("sources", sources)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{name}: expected a dictionary by task, got a {type(given).__name__}")
        fields = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
        if not fields:
            raise ValueError("inputs: expected at least one field, got none")
        first = next(iter(fields.values()))
        packed = isinstance(first, PackedSequence)
        order = self._packing(fields, lengths)
        data = {name: f.data if packed else self._pack(f, order) for name, f in fields.items()}
        batch = order.batch_sizes[0] if order.unsorted_indices is None else order.unsorted_indices.shape[0]
        known = {} if targets is None else self._decoded(targets, wanted, batch)
        copied = {
            task: field.data if isinstance(field, PackedSequence) else self._pack(field, order)
            for task, field in self._copied(sources or {}, wanted, first).items()
        }
        logits = self._logits(data if isinstance(inputs, Mapping) else data["tokens"], order, wanted, known, copied)
        for task in wanted:
            values = logits[task]
            if isinstance(self.heads[task], DecoderHead):
                if task in known:
                    logits[task] = _as_targets(values, known[task], targets[task])
            elif self.heads[task].pooling is not None:
                unsorted = order.unsorted_indices
                logits[task] = values if unsorted is None else values.index_select(0, unsorted)
            elif packed:
                logits[task] = PackedSequence(values, *first[1:])
            else:
                logits[task] = ops.unpack(values, order, batch_first=self.encoder.batch_first)
        return _as_program_output(logits) if is_exporting() else logits

    def generate(
        self,
        inputs: Input,
        lengths: Tensor | Sequence[int] | None = None,
        task: str | None = None,
        search: Search | None = None,
        max_length: int = MAX_LENGTH,
        attention: bool = False,
        never: Sequence[int] = (),
        sources: Mapping[str, Field] | None = None,
    ) -> list[list[Hypothesis]]:
        """What a decoder answers to each sequence, or how a language model of one direction goes on with it. The model
        has to be in eval mode.

        Args:
            inputs, lengths: as for :meth:`forward`; token ids for a language model.
            task: the decoder's or the language model's; may be left out where there is one.
            search: how answers are looked for, or drawn; None: the likeliest token at each step.
            max_length: tokens at most. A language model does not end before.
            attention: of a decoder, whether to give what each step has read.
            never: tokens that are not to come, as those of padding and of unknown words.
            sources: of a decoder that copies, as for :meth:`forward`.

        Returns:
            For each sequence its ``nbest`` answers, the best first; draws are numbered from 0 in their order. Of a
            language model the tokens behind the input's.

        Raises:
            KeyError: the task is unknown.
            RuntimeError: the model is in training mode, a length is out of range, or a logit is nan.
            TypeError: ``search`` is no :class:`pymtl.Search`, or ``max_length`` or one of ``never`` no whole number.
            ValueError: the task is neither a decoder's nor a language model's, or is left out where there are several;
                ``max_length`` or one of ``never`` is out of range; ``sources`` are missing or not laid out as the
                input; or this language model cannot go on with a text: its encoder or embedding is not of that kind,
                or ``attention`` or a coverage penalty is asked for.
        """
        able = [name for name, head in self.heads.items() if isinstance(head, DecoderHead | LanguageModelHead)]
        if task is None and len(able) != 1:
            raise ValueError(f"task: expected one of {able or 'none: there is no decoder or language model'}, got none")
        task = able[0] if task is None else task
        if task not in self.heads:
            raise KeyError(f"task: unknown task {task!r}, expected one of {list(self.heads)}")
        if task not in able:
            raise ValueError(f"task: expected a decoder's or a language model's, got {task!r}")
        if self.training:
            raise RuntimeError("generate: expected a model in eval mode, got one in training: call model.eval()")
        check_limits(max_length, never, self.heads[task].out_features)
        if not isinstance(search, Search | None):
            raise TypeError(f"search: expected a pymtl.Search, got a {type(search).__name__}")
        settings = search or Search()
        if isinstance(self.heads[task], DecoderHead):
            with torch.no_grad():
                memory = self(inputs, lengths, [task], sources=sources)[task]
            return generate(memory, settings, max_length, attention, never)
        if attention:
            raise ValueError(f"attention: expected none of {task!r}: a language model attends to nothing")
        if settings.coverage_penalty > 0:
            raise ValueError(f"search: expected no coverage_penalty of {task!r}: a language model attends to nothing")
        why = why_not_on(self.embedding, self.encoder)
        if why is not None:
            raise ValueError(f"task: expected, for {task!r} to go on with a text, {why}")
        if isinstance(inputs, PackedSequence):
            inputs, lengths = pad_packed_sequence(inputs, batch_first=True)
        elif not isinstance(inputs, Tensor) or inputs.dim() != 2:
            raise ValueError("inputs: expected token ids for a language model, padded or packed")
        elif not self.encoder.batch_first:
            inputs = inputs.t()
        if lengths is None:
            lengths = [inputs.shape[1]] * inputs.shape[0]
        lengths = as_lengths(lengths, inputs.shape[0], inputs.device).cpu()
        ops.packing_order(lengths, inputs.shape[1])  # checks them
        return go_on(self.embedding, self.encoder, self.heads[task], inputs, lengths, settings, max_length, never)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("torch.jit.script cannot compile a MultiTaskModel; torch.export.export can export it")

    def _packing(self, fields: Mapping[str, Field], lengths: Tensor | Sequence[int] | None) -> ops.PackingOrder:
        names = iter(fields.items())
        name, first = next(names)
        if isinstance(first, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected none with a PackedSequence, which has its own")
            for other, field in names:
                if not isinstance(field, PackedSequence):
                    raise ValueError(f"inputs[{other!r}]: expected a PackedSequence like {name!r}, got a Tensor")
                if not same_packing(field, first):
                    raise ValueError(f"inputs[{other!r}]: expected the packing of {name!r}, got another")
            return ops.PackingOrder(first.batch_sizes, first.sorted_indices, first.unsorted_indices)
        if isinstance(first, Tensor) and len(fields) == 1:
            dims = 2 if self.embedding is not None else 3
            if name == "tokens" and first.dim() != dims:
                raise ValueError(f"tokens: expected a {dims}-D padded batch, got {first.dim()}-D")
        batch_first = self.encoder.batch_first
        for other, field in fields.items():
            if isinstance(field, PackedSequence):
                raise ValueError(f"inputs[{other!r}]: expected a Tensor like {name!r}, got a PackedSequence")
            if field.dim() < 2 or field.shape[:2] != first.shape[:2]:
                expected = list(first.shape[:2])
                raise ValueError(f"inputs[{other!r}]: expected a padded batch {expected}, got {list(field.shape)}")
        batch, steps = first.shape[:2] if batch_first else (first.shape[1], first.shape[0])
        if steps == 0:
            raise RuntimeError("tokens: expected sequence length to be larger than 0")
        if lengths is None:
            lengths = torch.full((batch,), steps, dtype=torch.int64, device="cpu")
        return ops.packing_order(as_lengths(lengths, batch, first.device).cpu(), steps, first.device)

    def _copied(self, sources: Mapping[str, Field], wanted: Sequence[str], first: Field) -> dict[str, Field]:
        """The sources of the tasks' decoders that copy; ``first``: a field of the input, as which they are laid out."""
        found = {}
        for task in wanted:
            head = self.heads[task]
            if not (isinstance(head, DecoderHead) and head.copy):
                continue
            field = sources.get(task)
            if is_exporting():
                if field is not None:
                    raise ValueError(
                        f"sources[{task!r}]: expected none under torch.export: the decoder's step takes them"
                    )
                continue
            if field is None:
                raise ValueError(f"sources: expected those of {task!r}, which copies")
            if isinstance(field, PackedSequence) != isinstance(first, PackedSequence):
                raise ValueError(f"sources[{task!r}]: expected a {type(first).__name__} like the input")
            packed = isinstance(field, PackedSequence)
            if not (same_packing(field, first) if packed else field.shape == first.shape[:2]):
                raise ValueError(f"sources[{task!r}]: expected the layout of the input")
            found[task] = field
        return found

    def _decoded(
        self, targets: Mapping[str, Field], wanted: Sequence[str], batch: int | Tensor
    ) -> dict[str, PackedSequence]:
        """The targets of the decoders among the tasks, packed."""
        known = {}
        for task in wanted:
            head, given = self.heads[task], targets.get(task)
            if not isinstance(head, DecoderHead) or given is None:
                continue
            if is_exporting():
                raise ValueError(
                    f"targets[{task!r}]: expected none under torch.export, whose program gives what answers are made "
                    "from"
                )
            try:
                with late_errors_about(f"targets[{task!r}]"):
                    known[task] = head.packed(given)
            except (IndexError, TypeError, ValueError) as error:
                raise type(error)(f"targets[{task!r}]: {error}") from None
            sizes = known[task].batch_sizes
            count = int(sizes[0]) if len(sizes) > 0 else 0
            if count != int(batch):
                raise ValueError(f"targets[{task!r}]: expected {int(batch)} sequences, got {count}")
        return known

    def _pack(self, padded: Tensor, order: ops.PackingOrder) -> Tensor:
        return ops.pack(padded, order, batch_first=self.encoder.batch_first)

    def _logits(
        self,
        data: Tensor | Mapping[str, Tensor],
        order: ops.PackingOrder,
        wanted: tuple[str, ...],
        targets: Mapping[str, PackedSequence],
        sources: Mapping[str, Tensor],
    ) -> Logits:
        """In the packed order: of tokens [N, ...], of sequences [B, ...]. ``targets``, ``sources``: of decoders."""
        if self.embedding is not None:
            data = self.embedding(data)
        if not isinstance(data, Tensor):
            raise ValueError(f"inputs: expected one field of features without an embedding, got {list(data)}")
        tasks = self._with_those_before(wanted)
        skipping = {self.heads[task].pooling for task in tasks if self.heads[task].reads.skip}
        embedded = self._dropped(States.of(data, order.batch_sizes, directions=1), skipping)
        data = embedded.tokens
        layers = self.encoder.encoder if type(self.encoder) is HardSharing else self.encoder
        plain = isinstance(layers, Recurrent)
        if plain and layers.kernels_take(data) and not self._needs_states(data, layers, tasks):
            fused = self._fused(layers, data, order, tasks)
            return Logits({task: fused[task] for task in wanted})
        shared, penalties = self._states(data, order.batch_sizes, tasks)
        poolings = {self.heads[task].pooling for task in tasks}
        dropped = {id(states): self._dropped(states, poolings) for states in shared.values()}
        states_of = {task: dropped[id(states)] for task, states in shared.items()}
        groups: dict[tuple[int, str | None], list[str]] = {}
        for task in tasks:
            if self.heads[task].is_plain:
                groups.setdefault((id(states_of[task]), self.heads[task].pooling), []).append(task)
        found: dict[str, Tensor] = {}
        for (_, pooling), members in groups.items():
            states = states_of[members[0]]
            features = states.tokens if pooling is None else states.pooled(pooling)
            parts = states.directions if pooling is None and plain else 1
            found |= self._project(features, members, parts, states.fused)
        for task in tasks:
            if task not in found:
                head = self.heads[task]
                before = found.get(head.reads.after)
                if isinstance(head, DecoderHead):
                    own = sources.get(task)
                    memory = head.memory(states_of[task], embedded, before, order.unsorted_indices, own)
                    found[task] = head(memory, targets[task]) if task in targets else memory
                else:
                    found[task] = head(head.features(states_of[task], embedded, before))
        result = Logits({task: found[task] for task in wanted})
        result.penalties = penalties
        result.states = {task: shared[task].tensors() for task in wanted}
        if len({id(shared[task]) for task in wanted}) == 1:
            result.shared = result.states[wanted[0]]
        return result

    def _states(self, data: Tensor, batch_sizes: Tensor, tasks: Sequence[str]) -> SharingResult:
        if isinstance(self.encoder, Sharing):
            return self.encoder(data, batch_sizes, tasks)
        output, state = self.encoder(PackedSequence(data, batch_sizes))
        h_n = state[0] if isinstance(state, tuple) else state
        directions = 2 if self.encoder.bidirectional else 1
        last = h_n[-directions:].transpose(0, 1).flatten(1)
        fused = self.encoder.kernels_take(data)
        return SharingResult(dict.fromkeys(tasks, States(output.data, batch_sizes, directions, last, fused)), {})

    def _fused(
        self, layers: Recurrent, data: Tensor, order: ops.PackingOrder, tasks: Sequence[str]
    ) -> dict[str, Tensor]:
        """Heads and pooling inside the last layer's time loop: the states are never written."""
        groups: dict[str | None, list[str]] = {}
        for task in tasks:
            groups.setdefault(self.heads[task].pooling, []).append(task)
        weight, bias = self._stacked(groups.get(None, []))
        result = layers.forward_heads(data, order.batch_sizes, weight, bias, mean="mean" in groups, max="max" in groups)
        pooled = {"last": result.h_n.transpose(0, 1).flatten(1), "mean": result.mean, "max": result.max}
        found: dict[str, Tensor] = {}
        for pooling, members in groups.items():
            if pooling is None:
                found |= zip(members, self._split(result.logits, members))
            else:
                found |= self._project(pooled[pooling], members, 1, True)
        return found

    def _needs_states(self, data: Tensor, layers: Recurrent, tasks: Sequence[str]) -> bool:
        """Whether the states are needed themselves: for a derivative, to drop some, or by a module's own code."""
        return (
            (self.training and self.dropout > 0)
            or not all(self.heads[task].is_plain for task in tasks)
            or runs_own_code(layers, Recurrent)
            or (layers is not self.encoder and runs_own_code(self.encoder, HardSharing))
            # To go through all parameters takes longer than a short call.
            or (not is_plain() and self._derives(data, *self.parameters()))
        )

    @staticmethod
    def _derives(*tensors: Tensor) -> bool:
        return wants_gradient(*tensors) or needs_reference(*tensors)

    def _with_those_before(self, wanted: Sequence[str]) -> list[str]:
        """The tasks wanted and those they read after, in an order to compute them in."""
        needed = set(wanted)
        for task in reversed(self._order):
            if task in needed and self.heads[task].reads.after is not None:
                needed.add(self.heads[task].reads.after)
        return [task for task in self._order if task in needed]

    def _project(self, features: Tensor, tasks: Sequence[str], parts: int, fused: bool) -> dict[str, Tensor]:
        function = ops.heads if fused else reference.heads
        return dict(zip(tasks, self._split(function(features, *self._stacked(tasks), parts=parts), tasks)))

    def _stacked(self, tasks: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        if not tasks:
            return None, None
        weights, biases = zip(*(self.heads[task].projection() for task in tasks))
        if len(tasks) == 1:
            return weights[0], biases[0]
        return torch.cat(weights), torch.cat(biases)

    def _split(self, logits: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        return (
            list(logits.split([self.heads[task].out_features for task in tasks], dim=-1))
            if len(tasks) > 1
            else [logits]
        )

    def _dropped(self, states: States, poolings: Collection[str | None]) -> States:
        if not self.training or self.dropout == 0:
            return states

        def drop(tensor: Tensor) -> Tensor:
            if self.variational and tensor is states.tokens:
                masks = dropout(tensor.new_ones(states.batch, tensor.shape[1]), self.dropout)
                return tensor * masks.index_select(0, states.rows())
            return dropout(tensor, self.dropout)

        return states.dropped(drop, poolings)

    def _check_language_model(self, task: str) -> None:
        encoder = self.encoder
        if isinstance(encoder, Sharing):
            apart = encoder.separates_directions(task)
        else:
            apart = not encoder.bidirectional or encoder.num_layers == 1
        if not apart:
            raise ValueError(
                f"heads[{task!r}]: expected an encoder of one layer or one direction for a language model: in others "
                "a state has read what it should predict"
            )


def _as_program_output(logits: Logits) -> dict[str, Tensor]:
    """What torch.export knows: tensors by name."""
    found: dict[str, Tensor] = {}
    for task, values in logits.items():
        own = memory_tensors(task, values) if isinstance(values, Memory) else {task: values}
        for name in own:
            if name in found:
                raise ValueError(f"heads: expected names that differ in the program's output, got {name!r} twice")
        found |= own
    return found


def _as_targets(values: Tensor, packed: PackedSequence, targets: Field) -> Field:
    """A decoder's logits [M, C], laid out as its targets."""
    if isinstance(targets, PackedSequence):
        return targets._replace(data=values)
    steps, sizes = targets.shape[1], packed.batch_sizes
    # No sequence may reach the last steps.
    sizes = torch.cat([sizes, sizes.new_zeros(max(steps - len(sizes), 0))])
    return ops.unpack(values, ops.PackingOrder(sizes, *packed[2:]), batch_first=True)[:, :steps]


def _reading_order(heads: Mapping[str, Head]) -> list[str]:
    """The tasks, each behind the one it reads after."""
    order: list[str] = []
    waiting = list(heads)
    while waiting:
        ready = [task for task in waiting if heads[task].reads.after is None or heads[task].reads.after in order]
        if not ready:
            break
        order += ready
        waiting = [task for task in waiting if task not in ready]
    for task in waiting:
        after = heads[task].reads.after
        if after not in heads:
            raise ValueError(f"heads[{task!r}]: reads after {after!r}, expected one of {list(heads)}")
    for task in order:
        after = heads[task].reads.after
        if after is not None and not isinstance(heads[after].loss, CrossEntropy | CRFLoss):
            raise ValueError(f"heads[{task!r}]: reads after {after!r}, expected a head of classes or tags")
        if after is not None and isinstance(heads[after], LanguageModelHead | DecoderHead):
            raise ValueError(
                f"heads[{task!r}]: reads after {after!r}, expected another than a language model or a decoder"
            )
    if waiting:
        raise ValueError(f"heads: expected an order to read one after another, got a circle of {waiting}")
    return order
