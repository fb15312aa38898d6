"""PyTorch Lightning on Flyte 2: `ModelCheckpoint` writes a folder, Flyte's checkpoint keeps it, `last.ckpt` resumes.

python examples/lightning_training.py
"""

import tempfile

import flyte
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import flytekit_ckpt.auto

env = flyte.TaskEnvironment(name="lightning-training")


class Model(lightning.LightningModule):
    """A line through points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.layer(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class SavedModelCheckpoint(ModelCheckpoint):
    """Has Flyte keep the folder after every epoch."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        flyte.ctx().checkpoint.save_sync(self.dirpath)


class FailingOnce(lightning.Callback):
    """Stands for a machine that vanishes during the first attempt."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        print(f"epoch {trainer.current_epoch}")
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("simulated failure")


@env.task(retries=3)
def train(epochs: int, fail_at: int) -> list[float]:
    root = flyte.ctx().checkpoint.load_sync()
    last = flyte.latest_checkpoint(root, glob_pattern="**/last.ckpt") if root else None

    lightning.seed_everything(0)
    inputs = torch.randn(64, 4)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    model = Model()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[SavedModelCheckpoint(tempfile.mkdtemp(), save_last=True), FailingOnce(-1 if last else fail_at)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=last)
    return model.layer.weight[0].tolist()


if __name__ == "__main__":
    run = flyte.with_runcontext(mode="local").run(train, epochs=6, fail_at=3)
    print(run.outputs()[0])
