"""A Trainer of transformers. The lines that end in `# fastnn` are all that changes.

The model is tiny and random, so nothing is downloaded.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import fastnn  # fastnn

torch.manual_seed(0)
config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
model = GPT2LMHeadModel(config)
fastnn.convert(model)  # fastnn
print(fastnn.explain(model, torch.arange(16)[None]).counts())  # fastnn
torch.manual_seed(1)


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **rest):
        if "loss" in logs:
            print(f"step {state.global_step}  loss {logs['loss']:.9g}")


words = torch.randint(64, (16, 16))
trainer = Trainer(
    model,
    TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=[{"input_ids": w, "labels": w} for w in words],
    callbacks=[Print()],
)
trainer.train()
print(len(model.state_dict()), type(model.transformer.ln_f).__name__)
