"""Load a base model, write some text, and score some: everything is plain Hugging Face.

python examples/01_text.py
"""

import deepseek
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.text.chat_template import encode_prompt

model, tokenizer = deepseek.load("smollm2-135m")

prompt = tokenizer("def fibonacci(n):", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))

scores = model.log_probs(
    tokenizer("Paris is the capital of France.", return_tensors="pt").input_ids
)
print(f"\nmean log probability of a true sentence: {scores.mean():.3f}")

question = [{"role": "user", "content": "What is the capital of France?"}]
with Engine(model, tokenizer) as engine:
    for event in engine.submit(
        Request(tuple(encode_prompt(tokenizer, question)), Sampling(max_new_tokens=16))
    ):
        print(event.text, end="", flush=True)
print()
