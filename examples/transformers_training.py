"""A Hugging Face `Trainer` that resumes: `FlyteCallback` saves every checkpoint folder, `cp.restore()` finds the last.

The model is made from a configuration; nothing is downloaded.
"""

import hashlib
import tempfile

import torch
from flytekit import current_context, task
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import FlyteCallback

import flytekit_ckpt.auto


class Sentences(Dataset):
    """Random tokens, always the same."""

    def __init__(self) -> None:
        self.tokens = torch.randint(0, 100, (128, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Steps(TrainerCallback):
    """Tells how far the training is."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        print(f"starting at step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        print(f"step {state.global_step}")


@task(retries=5)
def train(steps: int) -> str:
    cp = current_context().checkpoint
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=8,
        save_steps=4,
        save_total_limit=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[FlyteCallback(), Steps()])
    trainer.train(resume_from_checkpoint=cp.restore())

    # Equal for equal weights.
    digest = hashlib.sha256()
    for weights in model.state_dict().values():
        digest.update(weights.numpy().tobytes())
    return digest.hexdigest()
