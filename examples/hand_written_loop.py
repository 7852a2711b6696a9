"""No Trainer: the same method in a training loop of your own, on a plain nn.Module.

python examples/hand_written_loop.py --epochs 5
"""

import argparse

import timm
import torch
from torch.nn.functional import cross_entropy

from cl_plugins.callbacks import NearestMean, OnePrompt
from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.result import StreamResult
from cl_plugins.scenarios import build_scenario

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="per task")
    args = parser.parse_args()

    torch.manual_seed(0)
    stream = build_scenario("split-digits")
    model = timm.create_model("vit_glyph", pretrained=True, num_classes=stream.n_classes)
    prompt, mean = OnePrompt(), NearestMean()
    prompt.install(model)
    mean.install(model)
    result = StreamResult(list(stream.tasks))

    for task in stream.tasks:
        stream.task = task.index
        prompt.start_task(model, task)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        model.train()
        for _ in range(args.epochs):
            for x, y in stream.train_dataloader():
                loss = cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        mean.fit_head(model, stream.train_loader_for_features(task.index))
        result.rows.append(evaluate_tasks(model, stream, task.index))
        print(f"after {task.name}: average accuracy {result.average_accuracy:.3f}")
