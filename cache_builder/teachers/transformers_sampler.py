"""The reference sampler: transformers, one row at a time, one token after the other. Slow and plain on purpose.

A row's numbers depend on nothing but the row, so its tokens do not either. The softmax is taken in float64 from the
logits of the last position, [1, V].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cache_builder.teachers.protocol import SampleRequest, TeacherError
from cache_builder.teachers.transformers_model import HeldModel


class TransformersSampler(HeldModel):
    """A `transformers.AutoModelForCausalLM` that writes; engine arguments are those of `TransformersTeacher`.

    Raises:
        ConfigError: the model cannot be loaded, or an engine argument is unknown.
    """

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
        """See `Sampler.sample`."""
        for number, request in enumerate(requests):
            yield number, self._continue(request)

    @torch.inference_mode()
    def _continue(self, request: SampleRequest) -> np.ndarray:
        generator = torch.Generator().manual_seed(request.seed)
        inputs_1L = torch.from_numpy(request.prompt.astype(np.int64)).to(self._device).unsqueeze(0)
        past: Any = None
        tokens: list[int] = []
        while len(tokens) < request.max_new_tokens:
            output = self._model(input_ids=inputs_1L, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            probs_V = torch.softmax(output.logits[0, -1].double().cpu() / request.temperature, -1)
            if not torch.isfinite(probs_V).all():
                raise TeacherError(
                    "logits must be finite, got NaN while writing a row; the model overflows in this dtype, "
                    "try --dtype bfloat16 or float32"
                )
            token = int(torch.multinomial(probs_V, 1, generator=generator))
            tokens.append(token)
            if token in request.stop_tokens:
                break
            inputs_1L = inputs_1L.new_tensor([[token]])
        return np.array(tokens, np.int32)
