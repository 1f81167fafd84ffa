"""A training loop of one's own on two processes: offline, in about a minute.

    accelerate launch --num_processes 2 examples/accelerate_loop.py                   # two GPUs
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node=2 examples/accelerate_loop.py   # two processes on the CPU

Model and data are those of quickstart.py. One process runs it too.
"""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from loralloc import AdaLoRA, Budget, attach, export_adapter
from loralloc.tasks.docstrings import build
from loralloc.tasks.locations import model_folder

folder = model_folder("demo:minilm")
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = build()["train"][:256]
areas = sorted({row["label"] for row in rows})
data = [{**tokenizer(row["text"], truncation=True, max_length=32), "label": areas.index(row["label"])} for row in rows]
torch.manual_seed(0)
base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(areas))
loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))

accelerator = Accelerator()
loader = accelerator.prepare(loader)
model = get_peft_model(base, LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="SEQ_CLS"))
run = attach(model, AdaLoRA(Budget(average_rank=8)), total_steps=len(loader))  # batches of one process
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model, optimizer = accelerator.prepare(model, optimizer)  # after attaching
for batch in loader:
    accelerator.backward(model(**batch).loss)
    run.before_step(optimizer)
    optimizer.step()
    run.after_step(optimizer)
    optimizer.zero_grad()
plan = run.finish()
export_adapter(accelerator.unwrap_model(model), "runs/accelerate/adapter")  # in every process; the first one writes

accelerator.print(f"{plan.total_rank} ranks on {accelerator.num_processes} process(es)")
accelerator.end_training()
