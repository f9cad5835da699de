"""Writes the lines of Python by which plain transformers and peft use what a run has tuned.

They need nothing of this package. The record's section `plain_use` has model, task and question.
"""

from __future__ import annotations

from fedsp_mpi.files.untrusted import JsonObject, printable
from fedsp_mpi.record.hdf5 import Run

_WIDTH = 96  # columns of a text within its quotes
_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}
_NEEDED = {"kind", "model", "revision", "tokenizer", "dtype", "tuned"}
_ANSWER = "print(max(scores, key=scores.get), scores)"


def lines(run: Run) -> list[str]:
    """Return the lines of code; none for a run that is not complete, or of an earlier version."""
    section = run.sections.get("plain_use")
    if run.status != "complete" or not section:
        return []
    if not section.keys() >= _NEEDED or section["kind"] not in _CLASSES:
        return []
    folders = {"prompt": run.prompt, "adapter": run.adapter, "head": run.head, "model": run.model}
    tuned = folders[section["tuned"]]
    if tuned is None:
        return []
    code = _loading(section, str(tuned)) + _asking(section)
    return [printable(line) for line in code]


def _loading(section: JsonObject, tuned: str) -> list[str]:
    """Return the lines that load tokenizer, model and prompt, or head."""
    has_base = section["tuned"] != "model"
    has_head = section["tuned"] == "head"
    model_class = _CLASSES[section["kind"]]
    name = "base" if has_base else "tuned"
    options = ", revision=revision" if has_base and section["revision"] else ""
    code: list[str] = []
    if has_head:
        code.append("from safetensors.torch import load_file")
    elif has_base:
        code.append("from peft import PeftModel")
    code.append(f"from transformers import AutoTokenizer, {model_class}")
    if has_base:
        code.append(f"base = {section['model']!r}")
    if options:
        code.append(f"revision = {section['revision']!r}")
    code.append(f"tuned = {tuned!r}")
    tokenizer = f"base{options}"
    if not has_base:
        tokenizer = "tuned"
    elif section["tokenizer"] != section["model"]:
        tokenizer = repr(section["tokenizer"])
    code.append(f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})")
    dtype = f", dtype={section['dtype']!r}"
    code.append(f"model = {model_class}.from_pretrained({name}{options}{dtype})")
    if has_head:
        code.append('head = load_file(f"{tuned}/head.safetensors")')
    elif has_base:
        code.append("model = PeftModel.from_pretrained(model, tuned)")
    return code


def _asking(section: JsonObject) -> list[str]:
    """Return the lines that ask the question, and print the answer with the choices' scores."""
    question = section.get("question", {})
    if "text" not in question:
        return []
    code = _assigned("text", question["text"])
    if "choices" not in question:
        num_tokens = question.get("num_tokens", 1)
        return [
            *code,
            'inputs = tokenizer(text, return_tensors="pt")',
            f"ids = model.generate(**inputs, max_new_tokens={num_tokens}, do_sample=False)",
            "print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]))",
        ]
    code += _choices(question["choices"])
    if section["tuned"] == "head":
        return [
            *code,
            'inputs = tokenizer(text, return_tensors="pt")',
            *_state(section["kind"], question),
            'logits = (head["weight"] @ state.float() + head["bias"]).log_softmax(-1)',
            "scores = dict(zip(choices, logits.tolist()))",
            _ANSWER,
        ]
    if "gap" in question or question.get("are_tokens"):
        return [
            *code,
            'inputs = tokenizer(text, return_tensors="pt")',
            *_logits(section["kind"], question),
            "ids = [ids[0] for ids in tokenizer(choices, add_special_tokens=False).input_ids]",
            "scores = dict(zip(choices, logits[ids].tolist()))",
            _ANSWER,
        ]
    return [
        *code,
        "scores = {}",
        "for choice in choices:",
        '    ids = tokenizer(text + choice, return_tensors="pt").input_ids',
        "    n = ids.shape[1] - len(tokenizer(text).input_ids)  # tokens of the choice",
        "    logits = model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)",
        "    scores[choice] = logits.gather(1, ids[0, -n:, None]).sum().item()",
        _ANSWER,
    ]


def _logits(kind: str, question: JsonObject) -> list[str]:
    """Return the lines that compute what the model expects in the place of the answer."""
    if kind == "causal" or "gap" not in question:
        return ["logits = model(**inputs).logits[0, -1].log_softmax(-1)"]
    if kind == "encoder_decoder":
        return [
            *_gap(kind, question["gap"]),
            "logits = model(**inputs, decoder_input_ids=start).logits[0, -1].log_softmax(-1)",
        ]
    return [
        *_gap(kind, question["gap"]),
        "logits = model(**inputs).logits[0, place].log_softmax(-1)",
    ]


def _state(kind: str, question: JsonObject) -> list[str]:
    """Return the lines that compute the last hidden state in the place of the answer."""
    if kind == "causal" or "gap" not in question:
        return ["state = model.base_model(**inputs).last_hidden_state[0, -1]"]
    if kind == "encoder_decoder":
        return [
            *_gap(kind, question["gap"]),
            "states = {'decoder_input_ids': start, 'output_hidden_states': True}",
            "state = model(**inputs, **states).decoder_hidden_states[-1][0, -1]",
        ]
    return [
        *_gap(kind, question["gap"]),
        "state = model.base_model(**inputs).last_hidden_state[0, place]",
    ]


def _gap(kind: str, token: str) -> list[str]:
    """Return the lines that find a text's gap, or begin a decoder's text with it."""
    gap = f"gap = tokenizer.convert_tokens_to_ids({token!r})"
    if kind == "encoder_decoder":
        start = "start = inputs.input_ids.new_tensor([[model.config.decoder_start_token_id, gap]])"
        return [gap, start]
    return [gap, "place = inputs.input_ids[0].tolist().index(gap) - inputs.input_ids.shape[1]"]


def _assigned(name: str, text: str) -> list[str]:
    """Return an assignment of a text, on as many lines as it needs."""
    if len(repr(text)) <= _WIDTH - len(name):
        return [f"{name} = {text!r}"]
    step = _WIDTH - 16  # some characters are written as several
    pieces = [text[start : start + step] for start in range(0, len(text), step)]
    return [f"{name} = (", *(f"    {piece!r}" for piece in pieces), ")"]


def _choices(choices: list[str]) -> list[str]:
    if len(repr(choices)) <= _WIDTH - 10:
        return [f"choices = {choices!r}"]
    return ["choices = [", *(f"    {choice!r}," for choice in choices), "]"]
