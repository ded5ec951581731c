"""srit's calculator in `generate` of transformers: the result behind an "=" is computed, not drawn.

    python examples/transformers_calculator.py out/dpo "Tom has 52 apples and eats 28. How many now?"

It gives the greedy texts of srit's --calculator True. Not for beam search, where a row changes places.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from srit.generation.calculator import Calculator, Forced


class CalculatorProcessor(LogitsProcessor):
    """Made anew for every call of generate. prompt_length: tokens of the (left-padded) prompts."""

    def __init__(self, tokenizer, vocab_size: int, prompt_length: int) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        self.calculator = Calculator(encode, decode, vocab_size, torch.device("cpu"))
        self.prompt_length, self.rows = prompt_length, {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for number, ids in enumerate(input_ids[:, self.prompt_length:].tolist()):
            row = self.rows.setdefault(number, Forced())
            if ids:
                self.calculator.advance(row, ids[-1])
                self.calculator.start(row, ids)
            if row.waiting:
                scores[number].fill_(-torch.inf)[row.waiting[0]] = 0
            elif row.open:
                likeliest, own = int(scores[number].argmax()), self.calculator
                mask = own.joins if own.continues[likeliest] else own.continues
                scores[number].masked_fill_(mask.to(scores.device), -torch.inf)
        return scores


def main(model_name: str, question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}], return_dict=True,
                                           add_generation_prompt=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    processor = CalculatorProcessor(tokenizer, model.config.vocab_size, length)
    output = model.generate(**inputs, max_new_tokens=256, do_sample=False, logits_processor=[processor])
    print(tokenizer.decode(output[0, length:], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
