"""Updates of the package `dnc` with Adam, in a Python of its own, old perhaps: imports nothing of kfacrnn.

    python -c "$(cat _reference_dnc.py)" '{"bits": 4, "steps": 22, …}'

It says its versions in one line of JSON. For every number n that it then reads, it does n updates and answers with the
wall and processor seconds of each: [[0.05, 0.05], …].
"""

import json
import sys
import time


def main(sizes: dict) -> None:
    import dnc  # type: ignore[import-not-found]
    import torch

    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    inputs, outputs = sizes["bits"] + 2, sizes["bits"] + 1
    model = dnc.DNC(
        inputs,  # and outputs: one more than needed
        sizes["hidden"],
        num_layers=1,
        num_hidden_layers=1,
        nr_cells=sizes["slots"],
        cell_size=sizes["word_size"],
        read_heads=sizes["read_heads"],
        batch_first=True,
        clip=sizes["clip"],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    shape = (sizes["batch_size"], sizes["steps"])

    def update() -> None:
        x = torch.randint(2, (*shape, inputs)).float()
        logits = model(x, (None, None, None), reset_experience=True)[0][..., :outputs]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, x[..., :outputs], reduction="sum")
        optimizer.zero_grad()
        (loss / shape[0]).backward()
        optimizer.step()

    update()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"torch": torch.__version__, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            wall, cpu = time.perf_counter(), time.process_time()
            update()
            seconds.append([time.perf_counter() - wall, time.process_time() - cpu])
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
