"""What vLLM and SGLang answer: requests as they come over the wire in, answers as Python objects out.

Both classes have `get(path)` and `post(path, body)`; these return a status and an object, and `None` as the object for
an empty body. An address that the server does not know gives 404.
"""

import itertools
import time
import zlib

from tests.remote.served_model import Generated, Sampling, ServedModel

NOT_FOUND = (404, {"detail": "Not Found"})


def log_prob(value: float) -> float:
    """A log-probability as JSON can hold it: both servers' way for the probability 0."""
    return max(float(value), -9999.0)


class BadRequest(Exception):
    """A request that the server refuses: the message, and where it has one the parameter at fault."""

    def __init__(self, message: str, param: str | None = None, value=None):
        super().__init__(message if param is None else f"{message} (parameter={param}, value={value})")
        self.param = param


class VLLM:
    """The completions of vLLM 0.32, compared with a running server on the CPU, answer by answer.

    What a client has to know:

    - A position's entries begin with the actual token, whose rank counts all tokens that are at least as likely. The
      most likely ones follow. There are K entries, or K + 1 where the actual token is not among them. K = 0 gives the
      actual token alone. Log-probabilities are those at temperature 1, and -9999.0 stands for minus infinity.
    - One token is always generated, also with `echo` and `max_tokens` 0, where only the text hides it. So a prompt
      has at most `max_model_len - 1` tokens. More tokens to generate than fit are cut without a word.
    - `decoded_token` of a part of a character is the character where the tokens before complete it, else empty: it
      differs from decoding the id alone.
    - Choices come in the order of the prompts. The same seed and prompt give the same tokens in one batch, too.
    - `logprobs` names tokens by their text, so two of them may collide; with `return_tokens_as_token_ids` by
      `token_id:ID`. `return_token_ids` gives the ids of the prompt and of what was generated.
    - Without `model` any model answers. Without a setting the model's generation config decides.

    Args:
        served: the model.
        max_logprobs: the largest number of log-probabilities a request may ask for (`--max-logprobs`), -1 for all.
        defaults: sampling settings from the model's generation config, which hold where a request has none.
    """

    guarded = ("/v1", "/v2", "/inference", "/cohere")  # paths that ask for a key

    def __init__(self, served: ServedModel, max_logprobs: int = 20, defaults: dict | None = None):
        self.served = served
        self.max_logprobs = max_logprobs
        self.defaults = defaults or {}
        self._number = itertools.count()

    def get(self, path: str):
        if path == "/health":
            return 200, None
        if path == "/version":
            return 200, {"version": self.served.version}
        if path == "/v1/models":
            card = {"id": self.served.name, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
            card |= {"root": f"/models/{self.served.name}", "parent": None}
            card |= {
                "max_model_len": self.served.max_model_len,
                "permission": [{"id": "modelperm-0", "object": "model_permission"}],
            }
            return 200, {"object": "list", "data": [card]}
        return (405, {"detail": "Method Not Allowed"}) if path == "/v1/completions" else NOT_FOUND

    def post(self, path: str, body: dict):
        if path != "/v1/completions":
            return NOT_FOUND
        name = body.get("model") or self.served.name
        if name != self.served.name:
            message = f"The model `{name}` does not exist. Valid aliases: {self.served.name}."
            return 404, self._error(message, "NotFoundError", "model", 404)
        try:
            prompts = self._prompts(body)
            how = self._sampling(body)
            asked = self._number_of_log_probs(body, "prompt_logprobs", "prompt")
            sample_asked = self._number_of_log_probs(body, "logprobs", "sample")
            for prompt in prompts:
                self._check(prompt, body.get("echo") and body.get("max_tokens") == 0)
        except BadRequest as refusal:
            return 400, self._error(str(refusal), "BadRequestError", refusal.param, 400)
        if asked is None and body.get("echo"):
            asked = sample_asked
        choices = [self._choice(index, prompt, body, how, asked, sample_asked) for index, prompt in enumerate(prompts)]
        tokens = sum(map(len, prompts))
        generated = sum(choice.pop("_generated") for choice in choices)
        answer = {"id": f"cmpl-{next(self._number):016x}", "object": "text_completion", "created": int(time.time())}
        fingerprint = f"vllm-{self.served.version}-{zlib.crc32(self.served.name.encode()):08x}"
        answer |= {"model": self.served.name, "choices": choices, "service_tier": None}
        answer["system_fingerprint"] = fingerprint
        usage = {"prompt_tokens": tokens, "total_tokens": tokens + generated, "completion_tokens": generated}
        answer["usage"] = usage | {"prompt_tokens_details": None, "completion_tokens_details": None}
        return 200, answer | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}

    def _error(self, message, kind, param, code):
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def _prompts(self, body) -> list[list[int]]:
        prompt = body.get("prompt")
        if isinstance(prompt, str) and prompt and self.served.tokenizer is not None:
            prompt = self.served.tokenizer.encode(prompt)
        if prompt == []:
            raise BadRequest("You must pass at least one prompt")
        if not prompt:
            raise BadRequest("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        return prompt if isinstance(prompt[0], list) else [prompt]

    def _sampling(self, body) -> Sampling:
        max_tokens = 16 if body.get("max_tokens") is None else body["max_tokens"]
        if max_tokens < 1 and not (max_tokens == 0 and body.get("echo")):
            raise BadRequest(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
        most = self.served.max_model_len
        if max_tokens > most:
            message = f"max_tokens={max_tokens} cannot be greater than max_model_len={most}. "
            raise BadRequest(message + "Please request fewer output tokens.", "max_tokens", max_tokens)

        def setting(name, otherwise):
            value = body.get(name)
            return self.defaults.get(name, otherwise) if value is None else value

        allowed = body.get("allowed_token_ids")
        how = Sampling(
            max_tokens=max(max_tokens, 1),
            temperature=float(setting("temperature", 1.0)),
            top_k=setting("top_k", 0),
            top_p=setting("top_p", 1.0),
            min_p=setting("min_p", 0.0),
            seed=body.get("seed"),
            stop_ids=tuple(body.get("stop_token_ids") or ()),
            ignore_eos=bool(body.get("ignore_eos")),
            allowed_ids=None if allowed is None else tuple(allowed),
            bias={int(id): bias for id, bias in (body.get("logit_bias") or {}).items()},
        )
        if not 0.0 <= how.temperature <= 2.0:
            message = f"temperature must be in [0, 2], got {how.temperature}."
            raise BadRequest(message, "temperature", how.temperature)
        for name, ids in (("stop_token_ids", how.stop_ids), ("logit_bias", how.bias)):
            outside = [id for id in ids if not 0 <= id < self.served.vocab_size]
            if outside:
                message = f"token_id(s) {outside} in {name} contain out-of-vocab token ids. Vocabulary size: "
                raise BadRequest(message + str(self.served.vocab_size), name, outside)
        outside = [id for id in allowed or () if not 0 <= id < self.served.vocab_size]
        if outside:
            raise BadRequest("allowed_token_ids contains out-of-vocab token id!", "allowed_token_ids", outside)
        return how

    def _number_of_log_probs(self, body, name: str, kind: str) -> int | None:
        asked = body.get(name)
        if asked is None:
            return None
        if asked < -1:
            raise BadRequest(f"`{name}` must be a positive value or -1.", name, asked)
        allowed = self.served.vocab_size if self.max_logprobs == -1 else self.max_logprobs
        asked = self.served.vocab_size if asked == -1 else asked
        if asked > allowed:
            message = f"Requested {kind} logprobs of {asked}, which is greater than max allowed: {allowed}"
            raise BadRequest(message, name)
        return asked

    def _check(self, prompt, is_echoed: bool):
        if not prompt:
            raise BadRequest("The decoder prompt cannot be empty")
        if max(prompt) >= self.served.vocab_size:
            raise BadRequest(f"Token id {max(prompt)} is out of vocabulary")
        most, length = self.served.max_model_len, len(prompt)
        if length > most:
            told = f"at least {length}" if length == most + 1 else length
            message = f"This model's maximum context length is {most} tokens. However, your prompt contains {told} "
            message += "input tokens, which exceeds this limit even without any output tokens. "
            raise BadRequest(message + "Please reduce the length of the input prompt.", "input_tokens", length)
        if length == most and not is_echoed:  # it fits, but the tokens to generate are cut to none
            raise BadRequest("max_tokens must be at least 1, got 0.", "max_tokens", 0)
        if length == most:
            message = f"The decoder prompt (length {length}) plus the number of requested output tokens (at least 1) "
            message += f"is longer than the maximum model length of {most}. Make sure that `max_model_len` is no "
            raise BadRequest(message + "smaller than the number of text tokens (prompt + requested output tokens).")

    def _choice(self, index, prompt, body, how: Sampling, asked, sample_asked) -> dict:
        made = self.served.generate(prompt, how)
        prompt_rows = None
        if asked is not None:
            log_probs = self.served.log_probs(prompt)
            rows = (self._entries(log_probs[i], prompt[: i + 1], prompt[i + 1], asked) for i in range(len(prompt) - 1))
            prompt_rows = [None, *rows]
        ids, rows = made.ids, self._sampled_entries(prompt, made, sample_asked)
        text = self.served.text(made.ids if made.stopped_by is None else made.ids[:-1])
        if body.get("echo"):
            shown = made.ids if body.get("max_tokens") != 0 else []
            ids = [*prompt, *shown]
            rows = None if sample_asked is None else [*prompt_rows, *rows][: len(ids)]
            text = ("" if body.get("return_token_ids") else self.served.text(prompt)) + (text if shown else "")
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        with_ids = bool(body.get("return_token_ids"))
        return {
            "index": index,
            "text": text,
            "logprobs": None if rows is None else self._openai_log_probs(ids, rows, sample_asked, as_ids),
            "finish_reason": "length" if made.stopped_by is None else "stop",
            "stop_reason": made.stopped_by if made.stopped_by in how.stop_ids else None,
            "token_ids": made.ids if with_ids else None,
            "prompt_logprobs": prompt_rows,
            "prompt_token_ids": prompt if with_ids else None,
            "routed_experts": None,
            "_generated": len(made.ids),
        }

    def _entries(self, log_probs, before, actual: int, number: int) -> dict:
        """The actual token with its rank, then the most likely ones: `number` entries, or one more."""
        values, ids = log_probs.topk(number)
        entries = {str(actual): {"logprob": log_prob(log_probs[actual]), "rank": self._rank(log_probs, actual)}}
        for place, (id, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
            entries[str(id)] = {"logprob": log_prob(value), "rank": place + 1}
        for id, entry in entries.items():
            entry["decoded_token"] = self.served.decoded(int(id), before)
        return entries

    def _rank(self, log_probs, id: int) -> int:
        return int((log_probs >= log_probs[id]).sum())

    def _sampled_entries(self, prompt, made: Generated, number: int | None):
        if number is None:
            return None
        before = [[*prompt, *made.ids[:i]] for i in range(len(made.ids))]
        steps = zip(made.log_probs, before, made.ids, strict=True)
        return [self._entries(row, ids, actual, number) for row, ids, actual in steps]

    def _openai_log_probs(self, ids, rows, number: int, as_ids: bool) -> dict:
        tokens, top, offsets = [], [], [0]
        for id, row in zip(ids, rows, strict=True):
            names = {key: f"token_id:{key}" if as_ids else entry["decoded_token"] for key, entry in (row or {}).items()}
            alone = f"token_id:{id}" if as_ids else self.served.text([id])
            tokens.append(alone if row is None else names[str(id)])
            offsets.append(offsets[-1] + len(tokens[-1]))
            kept = list((row or {}).items())[: number + 1]
            top.append(None if row is None else {names[key]: entry["logprob"] for key, entry in kept})
        values = [None if row is None else row[str(id)]["logprob"] for id, row in zip(ids, rows, strict=True)]
        return {"text_offset": offsets[:-1], "token_logprobs": values, "tokens": tokens, "top_logprobs": top}


class SGLang:
    """The native interface of SGLang; written from its source, not compared with a running server."""

    guarded = ("/",)
    unguarded = ("/health",)

    def __init__(self, served: ServedModel, max_logprobs: int = -1, defaults: dict | None = None):
        self.served = served
        self.defaults = defaults or {}
        self._completions = VLLM(served, max_logprobs, defaults)
        self._number = itertools.count()

    def get(self, path: str):
        served = self.served
        if path == "/health":
            return 200, None
        if path in ("/get_model_info", "/model_info"):
            info = {"model_path": f"/models/{served.name}", "tokenizer_path": f"/models/{served.name}"}
            return 200, info | {"is_generation": True, "preferred_sampling_params": None, "weight_version": "default"}
        if path in ("/get_server_info", "/server_info"):
            info = {"model_path": f"/models/{served.name}", "served_model_name": served.name, "dtype": "float32"}
            info |= {"context_length": None, "max_total_num_tokens": 65536, "max_req_input_len": served.max_model_len}
            return 200, info | {"internal_states": [{}], "version": served.version}
        if path == "/v1/models":
            card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "sglang"}
            card |= {"root": served.name, "parent": None, "max_model_len": served.max_model_len}
            return 200, {"object": "list", "data": [card]}
        return NOT_FOUND

    def post(self, path: str, body: dict):
        if path == "/v1/completions":  # the server's own one knows neither prompt_logprobs nor return_token_ids
            known = {k: v for k, v in body.items() if k not in ("prompt_logprobs", "return_token_ids")}
            status, answer = self._completions.post(path, known)
            for choice in answer.get("choices", ()):
                for field in ("prompt_logprobs", "prompt_token_ids", "token_ids", "stop_reason", "routed_experts"):
                    choice.pop(field)
            return status, answer
        if path != "/generate":
            return NOT_FOUND
        rows = body.get("input_ids")
        if not rows:
            return 400, {"error": {"message": "Either text, input_ids or input_embeds should be provided."}}
        single = not isinstance(rows[0], list)
        rows = [rows] if single else rows
        settings = body.get("sampling_params") or {}
        settings = settings if isinstance(settings, list) else [settings] * len(rows)
        start, top = body.get("logprob_start_len", -1), body.get("top_logprobs_num", 0)
        starts = start if isinstance(start, list) else [start] * len(rows)
        tops = top if isinstance(top, list) else [top] * len(rows)
        hows = [self._sampling(setting) for setting in settings]
        try:
            for ids, how in zip(rows, hows, strict=True):
                self._check(ids, how)
        except BadRequest as refusal:
            return 400, {"error": {"message": str(refusal)}}
        answers = [self._answer(body, *each) for each in zip(rows, hows, starts, tops, strict=True)]
        return 200, answers[0] if single else answers

    def _sampling(self, settings: dict) -> Sampling:
        def setting(name, otherwise):
            value = settings.get(name)
            return self.defaults.get(name, otherwise) if value is None else value

        return Sampling(
            max_tokens=setting("max_new_tokens", 128),
            temperature=setting("temperature", 1.0),
            top_k=setting("top_k", -1),
            top_p=setting("top_p", 1.0),
            min_p=setting("min_p", 0.0),
            seed=settings.get("sampling_seed"),
            stop_ids=tuple(settings.get("stop_token_ids") or ()),
            ignore_eos=bool(settings.get("ignore_eos")),
            bias={int(id): bias for id, bias in (settings.get("logit_bias") or {}).items()},
        )

    def _check(self, ids, how: Sampling):
        most, vocab_size = self.served.max_model_len, self.served.vocab_size
        if any(id >= vocab_size for id in ids):
            raise BadRequest(f"The input_ids {ids} contains values greater than the vocab size ({vocab_size}).")
        if len(ids) >= most:  # a prompt of the whole context is refused, too
            message = f"The input ({len(ids)} tokens) is longer than the model's context length ({most} tokens)."
            raise BadRequest(message)
        if len(ids) + how.max_tokens > most:
            message = f"Requested token count exceeds the model's maximum context length of {most} tokens. "
            message += f"You requested a total of {len(ids) + how.max_tokens} tokens: {len(ids)} tokens from the input "
            message += f"messages and {how.max_tokens} tokens for the completion. Please reduce the number of tokens "
            raise BadRequest(message + "in the input messages or the completion to fit within the limit.")

    def _answer(self, body: dict, ids: list[int], how: Sampling, start: int, top: int) -> dict:
        made = self.served.generate(ids, how)
        reason = {"type": "length", "length": len(made.ids)}
        if made.stopped_by is not None:
            reason = {"type": "stop", "matched": made.stopped_by}
        meta = {"id": f"{next(self._number):032x}", "finish_reason": reason, "prompt_tokens": len(ids)}
        meta |= {"weight_version": "default", "completion_tokens": len(made.ids), "cached_tokens": 0}
        if body.get("return_logprob"):
            with_text = bool(body.get("return_text_in_logprobs"))
            meta |= self._log_probs(ids, made, how, start, top, with_text)
        text = self.served.text(made.ids if made.stopped_by is None else made.ids[:-1])
        answer = {"text": text, "output_ids": made.ids, "meta_info": meta | {"e2e_latency": 0.001}}
        if body.get("return_prompt_token_ids"):
            answer["prompt_token_ids"] = ids
        return answer

    def _log_probs(self, ids, made: Generated, how: Sampling, start: int, top: int, with_text: bool) -> dict:
        """Of the prompt from `start` on (-1: none), null at the first; of generated tokens at their temperature."""
        start = len(ids) if start == -1 else start
        rows = self.served.log_probs(ids) if start < len(ids) else None
        at = [None if i == start else rows[i - 1] for i in range(start, len(ids))]
        out = made.log_probs if how.temperature == 0 else (made.log_probs / how.temperature).log_softmax(-1)
        # The server writes 0 for its last id, here as in the answers of the version that was read.
        shown = [id if id < self.served.vocab_size - 1 else 0 for id in ids]

        def entry(row, id, shown_id):
            value = None if row is None else log_prob(row[id])
            return [value, shown_id, self.served.text([shown_id]) if with_text else None]

        def most_likely(row):
            if row is None:
                return None
            values, found = row.topk(top)
            return [
                [log_prob(v), i, self.served.text([i]) if with_text else None]
                for v, i in zip(values, found.tolist(), strict=True)
            ]

        answer = {
            "input_token_logprobs": [entry(row, ids[start + i], shown[start + i]) for i, row in enumerate(at)],
            "output_token_logprobs": [entry(row, id, id) for row, id in zip(out, made.ids, strict=True)],
        }
        if top > 0:
            answer["input_top_logprobs"] = [most_likely(row) for row in at]
            answer["output_top_logprobs"] = [most_likely(row) for row in out]
        return answer


DIALECTS = {"vllm": VLLM, "sglang": SGLang}
