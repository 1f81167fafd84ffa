"""What a task is to the rest of the package: a row of `TASKS`. A new task is one file beside this one and one row here.

Imports neither torch nor transformers: recipes are read before these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from loralloc.setting_types import Between0And1, Count, Number, Positive, Section, Text, Whole, is_number, is_text


def _check_share_or_path(value: Any) -> Any:
    if is_text(value) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("must be a fraction between 0 and 1, such as 0.1, or a path")


ShareOrPath = Annotated[float | str, BeforeValidator(_check_share_or_path, json_schema_input_type=Between0And1 | Text)]


def _check_labels(value: Any) -> Any:
    if value is None or value == "regression":
        return value
    named = isinstance(value, list) and all(isinstance(label, str | int) for label in value)
    if named and len({str(label) for label in value}) == len(value) >= 2:
        return value
    raise ValueError("must be a list of at least two different labels, or regression, or null")


Classes = Annotated[list[str | int | bool], Field(min_length=2)]
Labels = Annotated[
    Literal["regression"] | list[str | int | bool] | None,
    BeforeValidator(_check_labels, json_schema_input_type=Literal["regression"] | Classes | None),
]


def _check_weights(value: Any) -> Any:
    if value is None or value == "balanced":
        return value
    if isinstance(value, Mapping) and value and all(is_number(weight) and weight > 0 for weight in value.values()):
        # As classes are named: a truth value by its word, a number by its digits.
        return {str(name).lower() if isinstance(name, bool) else str(name): value[name] for name in value}
    raise ValueError("must be balanced, or a mapping from classes to numbers above 0")


ClassWeights = Annotated[
    Literal["balanced"] | dict[str, Number] | None,
    BeforeValidator(_check_weights, json_schema_input_type=Literal["balanced"] | dict[str, Positive] | None),
]


class WeightedSource(Section):
    """One of several sources of training data."""

    source: Text = Field(description="data as in train")
    weight: Positive = Field(description="its share of the examples, relative to the other weights")


def _check_sources(value: Any) -> Any:
    weighted = [isinstance(one, Mapping) for one in value] if isinstance(value, list) else []
    plain = is_text(value) or (bool(weighted) and all(map(is_text, value)))
    if plain or (weighted and all(weighted)):
        return value
    raise ValueError("must be a path or hub:NAME, a list of them, or a list of {source: ..., weight: ...}")


Sources = Annotated[
    str | list[str] | list[WeightedSource],
    BeforeValidator(_check_sources, json_schema_input_type=Text | list[Text] | list[WeightedSource]),
]


class DataSection(Section):
    """The data of a recipe, whatever the task. Relative paths start at the current directory."""

    train: Sources = Field(
        description="a .jsonl, .json, .csv, .tsv, .parquet or .txt file (each also .gz), "
        "hub:NAME[/CONFIG][@SPLIT], or demo:docstrings[@SPLIT]; a list: one after the other, or mixed by weights "
        "until one of them is used up"
    )
    validation: ShareOrPath = Field(
        default=0.1, description="a fraction cut from the training data (by training.seed), or data as in train"
    )
    test: ShareOrPath | None = Field(
        default=None,
        description="data as in train, evaluated once at the end; or a fraction cut from the training data, the same "
        "rows whatever training.seed is",
    )
    also: dict[str, Text] | None = Field(
        default=None,
        description="more data to evaluate on at the end, by a name of yours, which is not validation or test: data as "
        "in train",
    )
    max_length: Count = Field(default=128, description="tokens kept of each example")


class ClassificationData(DataSection):
    """The keys of sequence classification."""

    text: Text | None = Field(default=None, description="column with the text")
    text_pair: Text | None = Field(default=None, description="column with a second text (sequence-classification)")
    label: Text | None = Field(
        default=None, description="column with the label (sequence-classification), or with a list of several"
    )
    labels: Labels = Field(
        default=None, description="null: found in the training data; or the list of labels; or regression"
    )
    class_weights: ClassWeights = Field(
        default=None,
        description="weights of classes in the training loss: balanced (rare ones count more), or a mapping of some",
    )


COLUMNS = '; or a template of columns, such as "{instruction}\\n\\n{input}"'


class PromptData(DataSection):
    """The key of tasks that ask for something."""

    prompt: Text | None = Field(
        default=None, description=f"column with the prompt, a text or (not for choices) a chat{COLUMNS}"
    )


class ChatData(PromptData):
    """The keys of tasks that render chats."""

    chat: bool | None = Field(
        default=None,
        description="whether prompts and answers become turns of the model's chat template; null: where it has one",
    )


class LanguageModelData(ChatData):
    """The keys of causal language modelling. Without any column named, it is recognised which ones there are."""

    text: Text | None = Field(default=None, description="column with the text")
    completion: Text | None = Field(
        default=None, description=f"column with the answer, which alone is learned{COLUMNS}"
    )
    messages: Text | None = Field(
        default=None, description="column with a chat: messages with role and content, or ShareGPT's from and value"
    )
    tools: Text | None = Field(
        default=None, description="column with the tools of a chat (JSON schemas); null: tools, where there is one"
    )
    learn: Literal["all", "last"] = Field(
        default="all", description="turns of the assistant that are learned, but those of weight 0"
    )
    packing: Literal["none", "wrapped", "bfd"] | None = Field(
        default=None,
        description="how examples share a row of max_length tokens: wrapped (joined and cut) or bfd (whole examples, "
        "which do not see each other); null: wrapped for text, else none",
    )
    streaming: bool = Field(default=False, description="read the training data while training, not before")


class PreferenceData(ChatData):
    """The keys of preference learning. Without any column named, it is recognised which ones there are."""

    chosen: Text | None = Field(default=None, description=f"column with the better answer, a text or a chat{COLUMNS}")
    rejected: Text | None = Field(default=None, description=f"column with the worse answer{COLUMNS}")


def _check_choices(value: Any) -> Any:
    if value is None or is_text(value) or (isinstance(value, list) and len(value) >= 2 and all(map(is_text, value))):
        return value
    raise ValueError("must be a column, or a list of at least two columns or texts")


class ChoiceData(PromptData):
    """The keys of multiple choice with a head: a question, its choices, and which one is right."""

    choices: Annotated[
        str | list[str] | None, BeforeValidator(_check_choices, json_schema_input_type=Text | list[Text] | None)
    ] = Field(
        default=None,
        description="column with the list of choices; or a list of columns (or templates), one a choice; or of texts "
        "that are the choices of every question, such as [no, yes]",
    )
    answer: Text | None = Field(
        default=None,
        description="column with the right choice: its label, its text, its number from 0, or its letter",
    )


class LikelihoodChoiceData(ChatData, ChoiceData):
    """The keys of multiple choice by likelihood."""


class WindowedData(DataSection):
    """What tasks share that look at every place of a long text."""

    stride: Whole | None = Field(
        default=None,
        description="tokens shared by two windows of a text longer than max_length; null: max_length // 3 for "
        "questions; for words no windows, and longer sentences are cut",
    )


class TokenClassificationData(WindowedData):
    """The keys of token classification."""

    tokens: Text | None = Field(
        default=None, description="column with the words of a sentence: a list, or a text split at white space"
    )
    tags: Text | None = Field(default=None, description="column with a tag for every word, in the same form")
    text: Text | None = Field(default=None, description="column with the text")
    spans: Text | None = Field(
        default=None, description="column with a list of {start, end, label}: character offsets, the end exclusive"
    )
    scheme: Literal["bio", "iob1", "bilou", "plain"] | None = Field(
        default=None,
        description="how tags write spans of words; plain: every tag stands for itself; null: detected from the tags",
    )


class QuestionData(WindowedData):
    """The keys of question answering."""

    question: Text | None = Field(default=None, description="column with the question")
    context: Text | None = Field(default=None, description="column with the text that holds the answer")
    answers: Text | None = Field(
        default=None,
        description="column with the answers: {text: [...], answer_start: [...]}, or a list of {text, answer_start}; "
        "empty if the text has none",
    )
    answer_length: Count = Field(default=30, description="tokens of an answer, at most")
    no_answer_threshold: Number = Field(
        default=0.0,
        description="no answer is predicted if it scores higher than the best answer by more than this; only if the "
        "training data have questions without an answer",
    )


class Seq2SeqData(DataSection):
    """The keys of sequence to sequence. `max_length` is the source's."""

    source: Text | None = Field(default=None, description=f"column with the text that is read{COLUMNS}")
    target: Text | None = Field(default=None, description=f"column with the text that is to be written{COLUMNS}")
    target_length: Count = Field(default=128, description="tokens kept of each target")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        label: What it is called in a report.
        module: The module that prepares its data, with `prepare` and `prepare_evaluation`.
        data: Its `data` section of a recipe.
        forms: Columns that must be named together; where there are several forms, exactly one of them.
        model_class: The class in transformers that has its head.
        peft_type: Its task type in PEFT; None if PEFT has none for it.
        metrics: The metrics that a run may be judged by, and whether more is better.
        shortest: The least `max_length`, and why.
        labelled: Whether the size of the head depends on the data.
        heads: Endings of the names of its heads, which are trained in full and get no adapter.
        generates: Whether its model generates texts, so that `evaluate.generate` applies.
        recognised: Whether columns with common names are recognised and need not be named.
        predicts: Whether there is a prediction for every example.
        trainer: The class of transformers or TRL that trains it.
        own_loss: Whether its loss is the one that the model returns for a batch with labels; methods that look at data
            need this loss.
        arguments: Dotted path of the class of its training arguments.
        row_loss: How the loss of a row differs from the loss of the task, in words, where it does.
    """

    label: str
    module: str
    data: type[DataSection]
    forms: tuple[tuple[str, ...], ...]
    model_class: str
    peft_type: str | None
    metrics: Mapping[str, bool]
    shortest: tuple[int, str] = (1, "")
    labelled: bool = False
    heads: tuple[str, ...] = ()
    generates: bool = False
    recognised: bool = False
    predicts: bool = True
    trainer: Literal["Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer"] = "Trainer"
    own_loss: bool = True
    arguments: str = "transformers.TrainingArguments"
    row_loss: str = "every row counts the same, however long it is"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own keys of a recipe's `data` section."""
        return tuple(name for name in self.data.model_fields if name not in DataSection.model_fields)


WRITTEN: Mapping[str, tuple[str, ...]] = {
    "exact_match": ("exact_match",),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
}
"""The metrics that compare answers with references (`evaluate.generate.metrics`), and the values that each gives."""

TASKS: Mapping[str, Task] = {
    "sequence-classification": Task(
        label="sequence classification",
        module="loralloc.tasks.sequence_classification",
        data=ClassificationData,
        forms=(("text", "label"),),
        model_class="AutoModelForSequenceClassification",
        peft_type="SEQ_CLS",
        metrics={
            **dict.fromkeys(("accuracy", "f1", "macro_f1", "micro_f1", "matthews", "pearson", "spearman"), True),
            "mse": False,
        },
        labelled=True,
        heads=("classifier", "score"),
    ),
    "token-classification": Task(
        label="token classification",
        module="loralloc.tasks.token_classification",
        data=TokenClassificationData,
        forms=(("tokens", "tags"), ("text", "spans")),
        model_class="AutoModelForTokenClassification",
        peft_type="TOKEN_CLS",
        metrics=dict.fromkeys(("f1", "precision", "recall", "accuracy", "macro_f1"), True),
        shortest=(3, "a word stands between two special tokens"),
        labelled=True,
        heads=("classifier", "score"),
    ),
    "question-answering": Task(
        label="question answering",
        module="loralloc.tasks.question_answering",
        data=QuestionData,
        forms=(("question", "context", "answers"),),
        model_class="AutoModelForQuestionAnswering",
        peft_type="QUESTION_ANS",
        metrics=dict.fromkeys(("f1", "exact_match"), True),
        heads=("qa_outputs",),
    ),
    "causal-lm": Task(
        label="causal language modelling",
        module="loralloc.tasks.causal_lm",
        data=LanguageModelData,
        forms=(("text",), ("prompt", "completion"), ("messages",)),
        model_class="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        metrics={"perplexity": False, "token_accuracy": True},
        shortest=(2, "a single token has no next one to predict"),
        generates=True,
        recognised=True,
        trainer="SFTTrainer",
        arguments="trl.SFTConfig",
    ),
    "preference": Task(
        label="preference learning",
        module="loralloc.tasks.preference",
        data=PreferenceData,
        forms=(("chosen", "rejected"),),
        model_class="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        metrics={"loss": False, "reward_accuracy": True, "reward_margin": True},
        shortest=(2, "a single token has no next one to predict"),
        recognised=True,
        predicts=False,
        trainer="DPOTrainer",
        arguments="trl.DPOConfig",
        own_loss=False,
    ),
    "multiple-choice": Task(
        label="multiple choice by likelihood",
        module="loralloc.tasks.multiple_choice",
        data=LikelihoodChoiceData,
        forms=(("prompt", "choices", "answer"),),
        model_class="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        metrics={"accuracy": True, "accuracy_token": True, "accuracy_character": True},
        shortest=(2, "a single token has no next one to predict"),
        trainer="SFTTrainer",
        arguments="trl.SFTConfig",
        row_loss="minus the logarithm of the right choice's share of the likelihood of all choices, where the loss of "
        "the task is that of the right answers' tokens alone",
    ),
    "multiple-choice-head": Task(
        label="multiple choice",
        module="loralloc.tasks.multiple_choice_head",
        data=ChoiceData,
        forms=(("prompt", "choices", "answer"),),
        model_class="AutoModelForMultipleChoice",
        peft_type=None,
        metrics={"accuracy": True},
        heads=("classifier",),
    ),
    "seq2seq": Task(
        label="sequence to sequence",
        module="loralloc.tasks.seq2seq",
        data=Seq2SeqData,
        forms=(("source", "target"),),
        model_class="AutoModelForSeq2SeqLM",
        peft_type="SEQ_2_SEQ_LM",
        metrics={"perplexity": False, "token_accuracy": True}
        | dict.fromkeys((figure for figures in WRITTEN.values() for figure in figures), True),
        generates=True,
        trainer="Seq2SeqTrainer",
        arguments="transformers.Seq2SeqTrainingArguments",
    ),
}

GREATER_IS_BETTER: Mapping[str, bool] = {name: more for task in TASKS.values() for name, more in task.metrics.items()}
"""The direction of every metric that a run may be judged by."""
