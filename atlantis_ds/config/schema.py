"""The typed recipe: one YAML file describes a whole experiment.

Reading a recipe imports neither torch nor any model code, so that ``atlantis-ds check`` runs on a login node.
The string below each key is its help text.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
DType = Literal["float32", "bfloat16"]
Loss = Literal["cross_entropy", "gce", "dft"]
Task = Literal["relation", "classification", "response"]
Files = str | list[str]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Noise(Section):
    kind: Literal["uniform", "confusion"] = "uniform"
    """`uniform` draws another label, all with equal probability; `confusion` draws from `table`."""
    rate: Fraction = 0.0
    """Share of training labels to make wrong (exactly round(rate * n) labels)."""
    table: dict[str, dict[str, float]] | None = None
    """For `confusion`: true label -> {wrong label: probability}."""

    @model_validator(mode="after")
    def _table_goes_with_confusion(self) -> Noise:
        if (self.kind == "confusion") != (self.table is not None):
            raise ValueError("`table` is needed for kind: confusion, and not allowed otherwise")
        return self


class Columns(Section):
    """The columns with a special meaning. Every other column can be a field of the prompt template."""

    id: str = "id"
    """The id of a row. Rows without an id get their row number."""
    label: str = "label"
    """relation and classification: the label to train on. A training row with an empty label, null or -1 is left
    out."""
    response: str | None = None
    """response: the text to learn (default: the first of `response`, `completion`, `output`, `answer` that exists)."""
    messages: str | None = None
    """response: a list of {role, content} turns, instead of prompt and response."""
    gold: str = "gold"
    """The true label or response, where it is known. Only an arm with `gold: true` trains on it."""
    group: str = "group"
    """What made the label: a rule, an annotator, a source."""


def _implied_task(task: Any, format: Any, response: Any, messages: Any) -> Any:
    if task or format:
        return task or "relation"
    return "response" if response or messages else "classification"


class Data(Section):
    task: Task | None = None
    """relation: two marked entities; classification: any text and a closed label set; response: a prompt and a free
    response, or a chat. Default: relation with `format`, response with `columns.response` or `columns.messages`, else
    classification."""
    format: Literal["semeval2010_task8", "spert", "grammar"] | None = None
    """Only for the official SemEval files, SpERT's JSON, and the built-in demo corpus (`grammar`, needs no files). All
    other files contain rows: JSON Lines, JSON, CSV, TSV, Parquet or Arrow, according to the suffix."""
    train: Files | None = None
    """File with the training examples; or a list of files, or a pattern such as data/part-*.jsonl. Paths are relative
    to the working directory."""
    dev: Files | None = None
    """Files with the development examples; without them, `dev_size` examples are moved from train."""
    test: Files | None = None
    """Files with the test examples; not needed if you only want weights."""
    hub_id: str | None = None
    """Hugging Face dataset id (or local folder) to read with `datasets` instead of the three files."""
    columns: Columns = Columns()
    """The meaning of the columns."""
    labels: list[str] | None = None
    """The label set, in order. Default: the format's own labels, else all labels in train, including gold labels."""
    max_labels: Positive = 200
    """More labels than this are probably free text, and are refused, unless `labels` names them."""
    negative_label: str | None = None
    """The label that says "none of the others", such as no_relation; macro-F1 does not count it as a class."""
    train_on: Literal["last", "all"] = "last"
    """messages: learn the last assistant turn, or all assistant turns."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """Rows that cannot be read: stop with an error, or leave them out and say how many."""
    on_too_long: Literal["refuse", "drop", "truncate_prompt"] = "refuse"
    """Examples longer than a model's context: stop with an error, leave them out, or cut the beginning of the
    prompt."""
    train_size: Positive | None = None
    """Use this many training examples, drawn at random with `seed`."""
    dev_size: Annotated[int, Field(ge=0)] = 0
    """Use this many development examples."""
    test_size: Positive | None = None
    """Use this many test examples."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """spert: number of entity pairs without a relation to add per sentence, with the label `None`."""
    noise: Noise = Noise()
    """Wrong labels to put into train; the gold labels are kept. A wrong response is the response of another example."""

    @property
    def kind(self) -> Task:
        """``task``, or the task that the section implies if it names none."""
        found: Task = _implied_task(self.task, self.format, self.columns.response, self.columns.messages)
        return found

    @model_validator(mode="after")
    def _source(self) -> Data:
        files = [key for key in ("train", "dev", "test") if getattr(self, key) is not None]
        if self.format == "grammar":
            if files or self.hub_id:
                raise ValueError("format: grammar generates its own corpus; remove `train`, `dev`, `test` and `hub_id`")
        elif self.hub_id:
            if files:
                raise ValueError("give either `hub_id` or the files `train`, `dev`, `test`, not both")
        elif self.train is None:
            raise ValueError("give `train` files (or `hub_id`)")
        if self.negatives and self.format != "spert":
            raise ValueError("`negatives` is only for format: spert")
        return self

    @model_validator(mode="after")
    def _task(self) -> Data:
        task = self.kind
        if self.format and task != "relation":
            raise ValueError(f"`format: {self.format}` contains relations; remove `task` or `format`")
        if task == "response":
            for key in ("labels", "negative_label"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` is only for label sets; a response is free text")
            if self.noise.kind == "confusion":
                raise ValueError("`noise.kind: confusion` is only for label sets; use `uniform` for responses")
        elif self.columns.response or self.columns.messages:
            raise ValueError(f"`columns.response` and `columns.messages` are only for task: response, not {task}")
        if self.columns.response and self.columns.messages:
            raise ValueError("give either `columns.response` or `columns.messages`, not both")
        if self.negative_label is not None and self.labels is not None and self.negative_label not in self.labels:
            raise ValueError(f"`negative_label`: {self.negative_label!r} is not in `labels`")
        return self


class Prompt(Section):
    template: str | None = None
    """The prompt, with fields in braces: {column} for any column of the rows; {options} for the label choices; for
    relations {sentence}, {marked_sentence} (entities as [E1] … [/E1]), {e1}, {e2}. Default: a template for the task.
    The common beginning of all prompts is read once per shard in scoring and once per micro-batch in training: label
    options at the beginning cost almost nothing."""
    label_options: bool = False
    """Add the list of label choices after the template."""

    @model_validator(mode="after")
    def _fields(self) -> Prompt:
        fields = set(re.findall(r"\{(\w*)\}", self.template or "{text}"))
        if not fields - {"options"}:
            raise ValueError(
                "`template` must contain a field of the example, such as {text} or {marked_sentence}; field names have "
                "only letters, digits and _"
            )
        if self.label_options and "options" in fields:
            raise ValueError(
                "`label_options` adds the labels, but the template already contains {options}; remove one of the two"
            )
        return self


class Scratch(Section):
    """A tiny model built from a config and pretrained on the corpus text, for the demo and for tests."""

    hidden_size: Positive = 128
    """Width of the model."""
    num_hidden_layers: Positive = 4
    """Number of layers."""
    num_attention_heads: Positive = 4
    """Attention heads per layer."""
    vocab_size: Positive = 1024
    """Vocabulary size of the tokenizer, which is also trained on the corpus."""
    pretrain_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs of pretraining on the corpus text."""

    @model_validator(mode="after")
    def _shape(self) -> Scratch:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("`hidden_size` must be a multiple of 2 x `num_attention_heads`")
        if self.vocab_size <= 256:
            raise ValueError("`vocab_size` must be above 256: one token per byte, and one for the end of a sequence")
        return self


class Model(Section):
    model_name_or_path: str | None = None
    """Hugging Face id, or a folder with safetensors and a tokenizer."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you set it."""
    scratch: Scratch | None = None
    """Build this model in the run folder instead of loading one."""

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (not self.model_name_or_path) == (self.scratch is None):
            raise ValueError("give exactly one of `model_name_or_path` and `scratch` (for a demo model)")
        return self


class Reference(Section):
    kind: Literal["checkpoint", "finetuned"] = "finetuned"
    """`checkpoint`: an existing model, e.g. an instruction-tuned one. `finetuned`: trained by this run."""
    model_name_or_path: str | None = None
    """kind checkpoint: the model. kind finetuned: the model to start from (default: models.small)."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you set it."""
    chat_template: bool = False
    """checkpoint: format the prompt with the tokenizer's chat template, as an instruction-tuned model expects."""
    on: Literal["train", "dev", "both"] = "train"
    """finetuned: train it on the training examples, on the gold labels of the dev split (with `folds: 1`), or on both:
    every fold then also trains on the dev examples."""
    folds: Positive = 2
    """finetuned: cross-fitting; each example is scored by a model that was not trained on it. 1 switches this off."""
    folds_by: Literal["text", "group"] = "text"
    """What must stay within one fold: equal texts, or also all examples of a `group` (a rule, an annotator, a source;
    `data.columns.group`). A reference that has seen a rule learns the errors that the rule makes repeatedly."""
    rounds: Positive = 1
    """finetuned: with 2, the folds are trained a second time, with weights from the first round's scores, so that wrong
    labels mislead the second round less. It takes twice as long."""
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """finetuned: epochs of the reference (default: train.num_train_epochs)."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """finetuned: learning rate of the reference (default: train.learning_rate)."""

    @model_validator(mode="after")
    def _checkpoint_named(self) -> Reference:
        if self.kind == "checkpoint" and self.model_name_or_path is None:
            raise ValueError("kind: checkpoint needs `model_name_or_path`")
        if self.kind == "finetuned" and self.chat_template:
            raise ValueError(
                "`chat_template` is only for kind: checkpoint; the run trains its own reference without a chat template"
            )
        if self.on != "train" and self.kind == "checkpoint":
            raise ValueError("`on` is only for kind: finetuned")
        if self.on == "dev" and self.folds != 1:
            raise ValueError("`on: dev` needs `folds: 1`: no training example is in the dev split")
        if self.folds_by == "group" and (self.kind == "checkpoint" or self.folds == 1):
            raise ValueError("`folds_by: group` needs kind: finetuned and `folds` of 2 or more")
        if self.rounds > 1 and (self.kind == "checkpoint" or self.folds == 1):
            raise ValueError(
                "`rounds` needs kind: finetuned and `folds` of 2 or more: otherwise a label would be judged by a "
                "model trained on it"
            )
        return self


class Models(Section):
    large: Model
    """The model that is trained; before training it gives p_L."""
    small: Model
    """The small base model, which gives p_S."""
    reference: Reference = Reference()
    """The reference model, which gives p_r."""
    stage: str | None = None
    """Folder on each node's own disk, such as $TMPDIR/models: model weights are copied there once per node, and all
    ranks of the node read them from there. Variables are expanded on the node."""


class Score(Section):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model body; logits and all log-probabilities are always fp32. `auto`: bfloat16 on GPUs, float32
    on CPUs; if there are shards already, their precision."""
    tokens_per_batch: Positive = 4096
    """Token budget of one batch, including padding."""
    label_set: bool = True
    """Score every label of the label set, not only the example's own label: needed for `weights.calibrate: label_set`,
    and for the label that `diagnose` suggests. A prompt is read once for all labels. Off for responses."""
    shard_size: Positive = 256
    """Examples per shard. Shards depend on the data alone, so that a run can resume with another number of ranks."""
    sharding: Literal["auto", "replica", "zero3"] = "auto"
    """A whole model on each rank, or one model sharded over all ranks; `auto` shards if a replica does not fit."""


class Weights(Section):
    formula: Literal["product", "ratio", "influence", "reference", "posterior", "uniform", "shuffled"] = "product"
    """log W: product a-s+r (Algorithm 1), ratio a-s (Eq. 7), influence r-s (Eq. 8), reference r, uniform 0. `posterior`
    (label sets): the log-probability that the given label is right, under a noise matrix fitted to the scores of all
    labels; 0 if no noise is found."""
    shuffled_from: Literal["product", "ratio", "influence", "reference", "posterior"] = "product"
    """For `shuffled`: the formula whose weights are permuted over the examples."""
    length: Literal["sum", "mean"] = "sum"
    """Log-likelihood of a target: the sum over its tokens, or the mean per token. Default for responses: mean."""
    eos: bool = False
    """Include the end-of-sequence token after the label."""
    calibrate: Literal["none", "label_mean", "label_set"] = "none"
    """`label_mean`: subtract from each model's score the mean score of that label. `label_set`: use the probability of
    the label among all labels of the set."""
    scope: Literal["global", "per_label"] = "global"
    """Normalise to mean 1 over all examples, or within each label."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of the weight."""
    smooth: Literal["none", "psis"] = "none"
    """Pareto-smoothed importance sampling (Vehtari et al. 2024)."""
    truncate: Literal["none", "sqrt_n"] = "none"
    """Limit weights to sqrt(n) times the mean weight (Ionides 2008)."""
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Limit weights to [lo, hi], relative to the mean weight."""
    temper: Annotated[float, Field(gt=0, le=1)] | None = None
    """Flatten the weights with the largest exponent in (0, 1] that raises the effective sample size to this share of
    n."""

    @property
    def base_formula(self) -> str:
        """The formula itself, or for `shuffled` the formula whose weights are permuted."""
        return self.shuffled_from if self.formula == "shuffled" else self.formula

    @model_validator(mode="after")
    def _clip_bounds(self) -> Weights:
        if self.clip is not None and not (0 <= self.clip[0] <= 1 <= self.clip[1] and self.clip[0] < self.clip[1]):
            raise ValueError("`clip` must be [lo, hi] with 0 <= lo <= 1 <= hi and lo < hi: the mean weight is 1")
        return self


class Train(Section):
    mode: Literal["full", "lora", "qlora"] = "full"
    """Train all model weights, LoRA adapters, or LoRA adapters on a 4-bit base (bitsandbytes NF4, double
    quantisation)."""
    bnb_4bit_quant_storage: DType | None = None
    """qlora: the type that stores the packed 4-bit weights; must equal `dtype`. Setting it allows ZeRO-3."""
    deepspeed: str = "zero3.json"
    """DeepSpeed config: the name of a config in the package, or a path that contains a folder. Its `auto` values are
    filled in from this recipe."""
    dtype: DType = "bfloat16"
    """bfloat16 keeps fp32 master weights in the optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW. LoRA needs about ten times the rate of full training."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """How often each training example is seen; a fraction is allowed."""
    warmup_ratio: Fraction = 0.03
    """Share of the optimizer steps in which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient norm to this value; 0: no clipping."""
    train_batch_size: Positive = 32
    """Examples per optimizer step, over all ranks. The same for any world size."""
    per_device_train_batch_size: Positive = 8
    """Examples per micro-batch on one rank; gradient accumulation follows from this and `train_batch_size`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, a third more computation."""
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = "auto"
    """Attention kernels for training; `auto` leaves the choice to transformers, usually `sdpa`. `flash_attention_2` (a
    separate package) and `flex_attention` need a GPU. Scoring and evaluation always use `auto`, whose kernels accept
    every mask."""
    torch_compile: bool = False
    """Compile each layer with torch.compile: takes a minute or more at the start; steps are then faster on most GPUs
    (on CPUs we measured slower ones). Not with ZeRO-3."""
    loss: Loss = "cross_entropy"
    """`gce` (generalised cross-entropy) and `dft` learn less from labels that the model finds unlikely."""
    gce_q: Annotated[float, Field(gt=0, le=1)] = 0.7
    """`gce`: near 0, the loss is the cross-entropy; at 1, the mean absolute error."""
    loss_warmup_ratio: Fraction = 0.5
    """`gce` and `dft`: share of the steps, at the beginning, that use the cross-entropy (in the papers: none)."""
    reduction: Literal["example", "token"] = "example"
    """Divide the weighted sum by the number of examples, or of label tokens, in the global batch."""
    lora_r: Positive = 16
    """Rank of the LoRA adapters."""
    lora_alpha: Positive = 32
    """The adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    lora_target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters, or `all-linear`."""
    logging_steps: Positive = 10
    """In a batch job, print one log line every this many steps (log.jsonl gets every step)."""
    eval_steps: Positive | None = None
    """Compute the dev loss every this many steps; default: once per epoch."""
    save_steps: Positive | None = None
    """Write a checkpoint every this many steps; default: once per epoch."""
    save_total_limit: Positive = 1
    """Checkpoints to keep per arm."""
    metric_for_best_model: Literal["loss", "accuracy", "macro_f1"] = "loss"
    """How to choose the `best` model: by the lowest dev loss or, for tasks with a label set, by the highest score on
    the dev examples. Each evaluation then ranks all labels for every dev example."""
    early_stopping_patience: Positive | None = None
    """Stop training after this many evaluations in a row without a better model (see `metric_for_best_model`). `last`
    is then the model at that step."""
    profile_steps: Positive | None = None
    """Profile this many steps, starting with the fourth, into profile/: a trace, and the operators that took
    longest."""
    max_skipped_steps: Positive = 5
    """A step whose loss or gradient is not finite is skipped and counted; this many in a row end the run."""

    @model_validator(mode="after")
    def _batches(self) -> Train:
        if self.per_device_train_batch_size > self.train_batch_size:
            raise ValueError("`per_device_train_batch_size` is larger than `train_batch_size`")
        return self

    @model_validator(mode="after")
    def _quant_storage(self) -> Train:
        if self.bnb_4bit_quant_storage is not None:
            if self.mode != "qlora":
                raise ValueError("`bnb_4bit_quant_storage` is only for mode: qlora")
            if self.bnb_4bit_quant_storage != self.dtype:
                raise ValueError(
                    "`bnb_4bit_quant_storage` must equal `dtype`: ZeRO-3 shards weights of one type together"
                )
        return self


class Arm(Section):
    weights: Weights | None = None
    """Weights of this arm; default: the recipe's own `weights`."""
    drop_lowest: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hard selection: leave out this share of the examples, those with the lowest weights; the others get equal
    weights."""
    drop_ids: str | None = None
    """File with the ids of examples to leave out, one per line: those that an annotator or another tool found wrong."""
    gold: bool = False
    """Train on the gold labels: shows what noise-free data would give."""
    dev: Literal["mixed", "last", "alone"] | None = None
    """Train on the gold labels of the dev split: `mixed` into the training examples, each with the mean weight of those
    that the arm keeps; `last`: after them, with a separate learning rate schedule; `alone`: on nothing else. Such arms
    have no dev loss."""
    loss: Loss | None = None
    """Loss of this arm; default: `train.loss`."""


DEFAULT_ARMS = {"sft": Arm(weights=Weights(formula="uniform")), "atlantis": Arm()}


class Evaluate(Section):
    method: Literal["rank", "generate"] = "rank"
    """Rank all labels by log-likelihood, or generate greedily and map the text to a label."""
    checkpoint: Literal["last", "best"] = "last"
    """Use the model at the end of training, or the best model by `train.metric_for_best_model`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Same as `score.dtype`."""
    tokens_per_batch: Positive = 4096
    """Token budget of one batch."""
    max_new_tokens: Positive = 32
    """For `generate`, and for responses (where the default is 256)."""
    answer: str | None = None
    """responses: a regular expression; only the captured text is compared, e.g. `#### (.*)`."""

    @model_validator(mode="after")
    def _answer_captures(self) -> Evaluate:
        if self.answer is not None:
            try:
                groups = re.compile(self.answer).groups
            except re.error as error:
                raise ValueError(f"`answer` is not a regular expression: {error}") from None
            if groups < 1:
                raise ValueError("`answer` must capture something: put ( ) around the part to compare")
        return self


def _task_of(tree: Any) -> Any:
    """The task of a recipe's ``data`` section before validation; None if it is not a section at all."""
    if not isinstance(tree, dict):
        return None
    columns = tree.get("columns")
    columns = columns if isinstance(columns, dict) else {}
    return _implied_task(tree.get("task"), tree.get("format"), columns.get("response"), columns.get("messages"))


RESPONSE_DEFAULTS: dict[str, dict[str, Any]] = {
    "weights": {"length": "mean"},
    "score": {"label_set": False},
    "evaluate": {"max_new_tokens": 256},
}
"""Defaults of a recipe for responses: sums over hundreds of tokens do not give useful weights."""


SbatchValue = str | int | bool | None
OF_THE_CHAIN = {"array", "dependency", "job-name", "kill-on-invalid-dep", "output", "parsable", "wait", "wrap"}


def _sbatch_options(options: dict[str, SbatchValue]) -> dict[str, SbatchValue]:
    for key in options:
        if not re.fullmatch(r"[a-z][a-z0-9-]+", key):
            raise ValueError(f"{key!r} is not a long option of sbatch; write it without leading dashes, such as `qos`")
        if key in OF_THE_CHAIN:
            raise ValueError(f"`{key}` is set by the chain of jobs; remove it")
    return options


Sbatch = Annotated[dict[str, SbatchValue], AfterValidator(_sbatch_options)]


class Slurm(Section):
    all: Sbatch = {}
    """Options of sbatch for every job that `submit` writes: `{account: abc, mail-user: me@example.org}`. `true` adds an
    option without a value; `null` removes an option."""
    prepare: Sbatch = {}
    """Options for the jobs of one stage, such as `{partition: cpu, time: "01:00:00"}`."""
    preflight: Sbatch = {}
    """The same for the jobs of `preflight`."""
    train: Sbatch = {}
    """The same for the jobs of `train`."""
    score: Sbatch = {}
    """The same for the jobs of `score`."""
    merge: Sbatch = {}
    """The same for the jobs of `merge`."""
    evaluate: Sbatch = {}
    """The same for the jobs of `evaluate`."""

    def of(self, stage: str) -> dict[str, SbatchValue]:
        """The options for the jobs of a stage."""
        own: dict[str, SbatchValue] = getattr(self, stage)
        return self.all | own


class Recipe(Section):
    name: str
    """Name of the run; its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: Seed = 0
    """Seed for data, noise, folds and scores; also for training, except in `compare`."""
    data: Data
    """The data to train and test on."""
    prompt: Prompt = Prompt()
    """The text that the models read before a label or response."""
    models: Models
    """The three frozen models that score the examples; the first is also the one that is trained."""
    score: Score = Score()
    """How the training examples are scored."""
    weights: Weights = Weights()
    """How scores become one weight per example."""
    train: Train = Train()
    """How the large model (and a fine-tuned reference) is trained."""
    arms: dict[str, Arm] = DEFAULT_ARMS
    """What to train and compare. All arms share data order, schedule and reduction."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2, 3, 4]
    """`compare` trains every arm once with each seed, which determines the order of the data, adapters and dropout."""
    evaluate: Evaluate = Evaluate()
    """How the test examples are predicted."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Where to send figures in addition to log.jsonl; each tracker is an extra of the package. If a tracker fails,
    training continues."""
    slurm: Slurm = Slurm()
    """Options that your site requires for jobs, for `submit`."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """If a rank waits longer than this for the others, the run ends."""

    @property
    def task(self) -> Task:
        return self.data.kind

    @property
    def tested(self) -> bool:
        """Whether the recipe names test examples."""
        return bool(self.data.test or self.data.hub_id or self.data.format == "grammar")

    @property
    def weighted(self) -> bool:
        """Whether an arm needs scores; if all weights are uniform, none does."""
        arms = [options for options in self.arms.values() if options.dev != "alone"]
        return any((options.weights or self.weights).formula != "uniform" for options in arms)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or _task_of(tree.get("data")) != "response":
            return tree
        sections = {key: {**values, **(tree.get(key) or {})} for key, values in RESPONSE_DEFAULTS.items()}
        arms = {
            name: {**arm, "weights": {**RESPONSE_DEFAULTS["weights"], **arm["weights"]}}
            for name, arm in (tree.get("arms") or {}).items()
            if isinstance(arm, dict) and isinstance(arm.get("weights"), dict)
        }
        return {**tree, **sections, **({"arms": {**tree["arms"], **arms}} if arms else {})}

    @model_validator(mode="after")
    def _no_label_set(self) -> Recipe:
        if self.task != "response":
            return self
        every = {"weights": self.weights} | {f"arms.{a}.weights": o.weights for a, o in self.arms.items() if o.weights}
        for key, weights in every.items():
            if weights.base_formula == "posterior":
                raise ValueError(f"`{key}.formula: posterior` needs a label set; responses have none")
            if weights.scope == "per_label" or weights.calibrate != "none":
                option = "scope: per_label" if weights.scope == "per_label" else f"calibrate: {weights.calibrate}"
                raise ValueError(f"`{key}.{option}` needs a label set; responses have none")
        if (metric := self.train.metric_for_best_model) != "loss":
            raise ValueError(f"`train.metric_for_best_model: {metric}` needs a label set; responses have none")
        if self.score.label_set:
            raise ValueError("`score.label_set: true` needs a label set; responses have none")
        return self

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for kind, name in [("name", self.name), *(("arms", arm) for arm in self.arms)]:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(
                    f"`{kind}`: {name!r} is used as a folder name: use only letters, digits, `-`, `_` and `.`"
                )
        if not self.arms:
            raise ValueError("`arms` is empty")
        if reserved := [arm for arm in self.arms if arm.startswith("reference")]:
            raise ValueError(
                f"`arms.{reserved[0]}`: names that start with `reference` are reserved; choose another name"
            )
        return self

    @model_validator(mode="after")
    def _arms_can_work(self) -> Recipe:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds`: {self.seeds} contains a duplicate")
        for arm, options in self.arms.items():
            weights = options.weights or self.weights
            if options.drop_lowest and weights.formula == "uniform":
                raise ValueError(
                    f"`arms.{arm}.drop_lowest`: uniform weights have no lowest ones; set other `weights` for this arm"
                )
            if options.dev == "alone" and (options.gold or options.drop_lowest or options.drop_ids or options.weights):
                raise ValueError(
                    f"`arms.{arm}.dev: alone` uses no training examples; remove `weights`, `gold`, `drop_lowest` and "
                    "`drop_ids`"
                )
            if options.gold and weights.formula != "uniform":
                raise ValueError(
                    f"`arms.{arm}.gold`: the weights were computed for the given labels, not for the gold labels; "
                    "set `weights: {formula: uniform}` for this arm"
                )
        every = {"weights": self.weights} | {f"arms.{a}.weights": o.weights for a, o in self.arms.items() if o.weights}
        for key, weights in every.items():
            posterior = weights.base_formula == "posterior"
            if posterior and weights.calibrate != "none":
                raise ValueError(f"`{key}.calibrate`: the posterior already compares labels; use `none`")
            if (posterior or weights.calibrate == "label_set") and not self.score.label_set:
                option = "formula: posterior" if posterior else "calibrate: label_set"
                raise ValueError(f"`{key}.{option}` needs `score.label_set: true`")
        return self

    @model_validator(mode="after")
    def _scratch_goes_with_grammar(self) -> Recipe:
        for name in ("large", "small"):
            if self.data.format != "grammar" and getattr(self.models, name).scratch:
                raise ValueError(f"`models.{name}.scratch` is only for data.format: grammar; give `model_name_or_path`")
        return self
