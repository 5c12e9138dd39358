"""The fast sampler: a vLLM engine that generates, with the teacher's weights, types and processes.

All requests of a call are queued while the scheduler is paused and then released at once: what runs together in a step
depends on the requests alone, never on timing, so the same call gives the same tokens again. vLLM's token ids are
taken as they are; nothing is decoded.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from cache_builder.teachers.protocol import SampleRequest, TeacherConfig, TeacherError
from cache_builder.teachers.vllm_engine import HeldEngine


class VLLMSampler(HeldEngine):
    """A vLLM engine as a sampler; as for `VLLMTeacher`, a script that makes one needs the usual guard of its main part.

    Raises:
        ConfigError: vLLM is not installed, does not know the architecture, or refuses a setting.
        TeacherError: the engine did not start.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config, pooling=False)

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
        """See `Sampler.sample`."""
        if self._engine is None:
            raise TeacherError("a closed sampler cannot write; make a new one")
        running: dict[str, int] = {}
        try:
            self._release(requests, running)
            while running:
                for output in self._step():
                    if output.finished:
                        number = running.pop(output.request_id)
                        yield number, np.array(output.outputs[0].token_ids, np.int32)
        finally:
            self._abort(running)  # the caller stopped early

    def _release(self, requests: Sequence[SampleRequest], running: dict[str, int]) -> None:
        """Queue all requests on the paused scheduler, then let it run."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._engine.sleep(level=0)
        for number, request in enumerate(requests):
            self._num_requests += 1
            name = str(self._num_requests)
            params = SamplingParams(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=request.max_new_tokens,
                stop_token_ids=list(request.stop_tokens),
                ignore_eos=True,  # what ends a row is in stop_tokens, and nowhere else
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._add(name, tokens_input(request.prompt.tolist()), params)
            running[name] = number
        self._engine.wake_up(tags=["scheduling"])
