"""A PyTorch training task that keeps its state as bytes: `cp.read` into `torch.load`, `torch.save` into `cp.write`."""

import io

import torch
from flytekit import current_context, task

import flytekit_ckpt.auto


@task(retries=5)
def train(epochs: int) -> float:
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = inputs.sum(dim=1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    cp = current_context().checkpoint
    start, loss = 0, 0.0
    if (saved := cp.read()) is not None:
        state = torch.load(io.BytesIO(saved))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        start, loss = state["epoch"] + 1, state["loss"]
    print(f"starting at epoch {start}")

    for epoch in range(start, epochs):
        optimizer.zero_grad()
        error = torch.nn.functional.mse_loss(model(inputs), targets)
        error.backward()
        optimizer.step()
        loss = error.item()

        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "generator": torch.get_rng_state(), "epoch": epoch, "loss": loss}, buffer)
        cp.write(buffer.getvalue())
        print(f"epoch {epoch}: loss {loss:.6f}")
    return loss
