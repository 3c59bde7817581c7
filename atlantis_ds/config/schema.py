"""The typed recipe: one YAML file describes a whole experiment.

Reading a recipe imports neither torch nor any model code, so that ``atlantis-ds check`` runs on a login node.
The string under each key is its help text.
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
    """`uniform` draws another label with equal chance; `confusion` draws from `table`."""
    rate: Fraction = 0.0
    """Share of training labels made wrong (exactly round(rate * n) of them)."""
    table: dict[str, dict[str, float]] | None = None
    """For `confusion`: true label -> {wrong label: probability}."""

    @model_validator(mode="after")
    def _table_goes_with_confusion(self) -> Noise:
        if (self.kind == "confusion") != (self.table is not None):
            raise ValueError("`table` is needed for kind: confusion, and only there")
        return self


class Columns(Section):
    """Which columns of the rows mean something. Every other column is a field of the prompt template."""

    id: str = "id"
    """Rows without it get their row number."""
    label: str = "label"
    """relation and classification: what is trained on. Empty, null or -1 in a training row: no label, left out."""
    response: str | None = None
    """response: the text to learn (default: the first of `response`, `completion`, `output`, `answer` there is)."""
    messages: str | None = None
    """response: a list of {role, content} turns, instead of prompt and response."""
    gold: str = "gold"
    """The true label or response, where it is known. Never trained on, but by an arm with `gold: true`."""
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
    """Only for the official SemEval files, SpERT's JSON, and the embedded demo corpus (`grammar`, needs no files).
    All other files are rows: JSON Lines, JSON, CSV, TSV, Parquet or Arrow, by their suffix."""
    train: Files | None = None
    """File with the training examples; or a list, or a pattern such as data/part-*.jsonl. Relative paths start at the
    working directory."""
    dev: Files | None = None
    """Files with the development examples; without them `dev_size` examples are cut from train."""
    test: Files | None = None
    """Files with the test examples; not needed where only weights are wanted."""
    hub_id: str | None = None
    """Hugging Face dataset id (or local folder) to read with `datasets` instead of the three files."""
    columns: Columns = Columns()
    """What the columns of the rows mean."""
    labels: list[str] | None = None
    """The label set, in order. Without it: the format's own labels, else all labels of train, gold ones included."""
    max_labels: Positive = 200
    """More labels than this are taken for free text, and refused, unless `labels` names them."""
    negative_label: str | None = None
    """The label that says "none of the others", such as no_relation: no class of its own in macro-F1."""
    train_on: Literal["last", "all"] = "last"
    """messages: learn the last assistant turn, or every one."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """Rows that cannot be read: end, or go on without them and say how many."""
    on_too_long: Literal["refuse", "drop", "truncate_prompt"] = "refuse"
    """Examples longer than a model reads: end, leave them out, or cut the beginning of the prompt."""
    train_size: Positive | None = None
    """Take this many training examples, by a seeded draw."""
    dev_size: Annotated[int, Field(ge=0)] = 0
    """Take this many development examples."""
    test_size: Positive | None = None
    """Take this many test examples."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """spert: number of entity pairs a sentence without a relation to add as label `None`."""
    noise: Noise = Noise()
    """Wrong labels put into train, with gold kept beside. A wrong response is that of another example."""

    @property
    def kind(self) -> Task:
        """``task``, or what the section implies where it names none."""
        found: Task = _implied_task(self.task, self.format, self.columns.response, self.columns.messages)
        return found

    @model_validator(mode="after")
    def _source(self) -> Data:
        files = [key for key in ("train", "dev", "test") if getattr(self, key) is not None]
        if self.format == "grammar":
            if files or self.hub_id:
                raise ValueError("format: grammar makes its own corpus; remove `train`, `dev`, `test` and `hub_id`")
        elif self.hub_id:
            if files:
                raise ValueError("`hub_id` and the files `train`, `dev`, `test` exclude each other")
        elif self.train is None:
            raise ValueError("`train` files (or `hub_id`) are needed")
        if self.negatives and self.format != "spert":
            raise ValueError("`negatives` is for format: spert")
        return self

    @model_validator(mode="after")
    def _task(self) -> Data:
        task = self.kind
        if self.format and task != "relation":
            raise ValueError(f"`format: {self.format}` holds relations; remove `task`, or the format")
        if task == "response":
            for key in ("labels", "negative_label"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` is for label sets; a response is free text")
            if self.noise.kind == "confusion":
                raise ValueError("`noise.kind: confusion` is for label sets; responses take `uniform`")
        elif self.columns.response or self.columns.messages:
            raise ValueError(f"`columns.response` and `columns.messages` are for task: response, not {task}")
        if self.columns.response and self.columns.messages:
            raise ValueError("`columns.response` and `columns.messages` exclude each other")
        if self.negative_label is not None and self.labels is not None and self.negative_label not in self.labels:
            raise ValueError(f"`negative_label`: {self.negative_label!r} is not in `labels`")
        return self


class Prompt(Section):
    template: str | None = None
    """The prompt, with {column} for each field: any column of the rows; {options}, the label choices; for relations
    {sentence}, {marked_sentence} (entities as [E1] … [/E1]), {e1}, {e2}. Without it one for the task. What all prompts
    begin with is read once for a shard in scoring and once for a micro-batch in training: options that come first cost
    next to nothing."""
    label_options: bool = False
    """List the label choices after the template."""

    @model_validator(mode="after")
    def _fields(self) -> Prompt:
        fields = set(re.findall(r"\{(\w*)\}", self.template or "{text}"))
        if not fields - {"options"}:
            raise ValueError("`template` must hold a field of the example, such as {text} or {marked_sentence}")
        if self.label_options and "options" in fields:
            raise ValueError("`label_options` lists the labels after a template that holds {options} already; drop one")
        return self


class Scratch(Section):
    """A tiny model built from a config and pretrained on the corpus text: for the demo and for tests."""

    hidden_size: Positive = 128
    """Width of the model."""
    num_hidden_layers: Positive = 4
    """Number of layers."""
    num_attention_heads: Positive = 4
    """Attention heads of a layer."""
    vocab_size: Positive = 1024
    """Tokens of the tokenizer, which is trained on the corpus, too."""
    pretrain_epochs: Annotated[int, Field(ge=0)] = 1
    """Passes over the corpus text before anything else."""

    @model_validator(mode="after")
    def _shape(self) -> Scratch:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("`hidden_size` must be a multiple of 2 x `num_attention_heads`")
        if self.vocab_size <= 256:
            raise ValueError("`vocab_size` must be above 256: a token for each byte, and the end of a sequence")
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
        if (self.model_name_or_path is None) == (self.scratch is None):
            raise ValueError("give `model_name_or_path` (or `scratch` for a demo model), exactly one of the two")
        return self


class Reference(Section):
    kind: Literal["checkpoint", "finetuned"] = "finetuned"
    """`checkpoint`: a ready model, e.g. an instruction-tuned one. `finetuned`: trained by this run."""
    model_name_or_path: str | None = None
    """kind checkpoint: the model. kind finetuned: what to start from (default: models.small)."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you set it."""
    chat_template: bool = False
    """checkpoint: put the prompt into the tokenizer's chat template, as an instruction-tuned model expects it."""
    on: Literal["train", "dev", "both"] = "train"
    """finetuned: train it on the training examples, on the gold labels of the dev split (then `folds: 1`), or on both:
    every fold has the dev examples among its own."""
    folds: Positive = 2
    """finetuned: cross-fitting; each example is scored by a model that did not train on it. 1 switches it off."""
    folds_by: Literal["text", "group"] = "text"
    """What stays in one fold: equal texts, or also all examples of a `group` (a rule, an annotator, a source;
    `data.columns.group`). What a rule gets wrong again and again, a reference that has seen the rule learns."""
    rounds: Positive = 1
    """finetuned: with 2, the folds are trained once more, on weights that the first round's scores give: wrong labels
    mislead the second round less. Twice the work."""
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """finetuned: epochs of the reference (default: train.num_train_epochs)."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """finetuned: learning rate of the reference (default: train.learning_rate)."""

    @model_validator(mode="after")
    def _checkpoint_named(self) -> Reference:
        if self.kind == "checkpoint" and self.model_name_or_path is None:
            raise ValueError("kind: checkpoint needs `model_name_or_path`")
        if self.kind == "finetuned" and self.chat_template:
            raise ValueError("`chat_template` is for kind: checkpoint; the run trains its own reference without one")
        if self.on != "train" and self.kind == "checkpoint":
            raise ValueError("`on` is for kind: finetuned")
        if self.on == "dev" and self.folds != 1:
            raise ValueError("`on: dev` needs `folds: 1`: no training example is in the dev split")
        if self.folds_by == "group" and (self.kind == "checkpoint" or self.folds == 1):
            raise ValueError("`folds_by: group` needs kind: finetuned and `folds` of 2 or more")
        if self.rounds > 1 and (self.kind == "checkpoint" or self.folds == 1):
            raise ValueError("`rounds` needs kind: finetuned and `folds` of 2 or more: else a label judges itself")
        return self


class Models(Section):
    large: Model
    """The model that is trained; its base scores p_L."""
    small: Model
    """The small base model p_S."""
    reference: Reference = Reference()
    """The reference model p_r."""
    stage: str | None = None
    """Folder of each node's own disk, such as $TMPDIR/models: weights are copied there once a node, and read from there
    by all its ranks. Variables are expanded on the node."""


class Score(Section):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model body; logits and all log-probabilities are fp32 in any case. `auto`: bfloat16 on GPUs,
    float32 on CPUs; shards that are there already decide."""
    tokens_per_batch: Positive = 4096
    """Token budget of one batch, padding included."""
    label_set: bool = True
    """Score every label of the label set, not only the example's own: for `weights.calibrate: label_set`, and for the
    label that `diagnose` suggests. A prompt is read once for all labels. Off for responses."""
    shard_size: Positive = 256
    """Examples a shard. Shards are cut by the data, so that a run may resume on another number of ranks."""
    sharding: Literal["auto", "replica", "zero3"] = "auto"
    """A whole model on each rank, or one sharded over all ranks; `auto` shards where a replica does not fit."""


class Weights(Section):
    formula: Literal["product", "ratio", "influence", "reference", "posterior", "uniform", "shuffled"] = "product"
    """log W: product a-s+r (Algorithm 1), ratio a-s (Eq. 7), influence r-s (Eq. 8), reference r, uniform 0. `posterior`
    (label sets): the log-probability that the given label is right, under a noise matrix fitted to the scores of all
    labels; 0 where no noise is found."""
    shuffled_from: Literal["product", "ratio", "influence", "reference", "posterior"] = "product"
    """For `shuffled`: the formula whose weights are permuted among the examples."""
    length: Literal["sum", "mean"] = "sum"
    """Log-likelihood of a target: sum over its tokens, or mean per token. Default for responses: mean."""
    eos: bool = False
    """Count the end-of-sequence token after the label."""
    calibrate: Literal["none", "label_mean", "label_set"] = "none"
    """`label_mean`: subtract from each model's score the mean score of that label. `label_set`: take the probability of
    the label among the labels of the set."""
    scope: Literal["global", "per_label"] = "global"
    """Mean 1 over all examples, or within each label."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent on the weight."""
    smooth: Literal["none", "psis"] = "none"
    """Pareto-smoothed importance sampling (Vehtari et al. 2024)."""
    truncate: Literal["none", "sqrt_n"] = "none"
    """Cap at sqrt(n) times the mean weight (Ionides 2008)."""
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """[lo, hi] in units of the mean weight."""
    temper: Annotated[float, Field(gt=0, le=1)] | None = None
    """Flatten by the largest exponent in (0, 1] that lifts the effective sample size to this share of n."""

    @property
    def base_formula(self) -> str:
        """The formula itself, or for `shuffled` the one whose weights are permuted."""
        return self.shuffled_from if self.formula == "shuffled" else self.formula

    @model_validator(mode="after")
    def _clip_bounds(self) -> Weights:
        if self.clip is not None and not (0 <= self.clip[0] <= 1 <= self.clip[1] and self.clip[0] < self.clip[1]):
            raise ValueError("`clip` must be [lo, hi] with 0 <= lo <= 1 <= hi and lo < hi: the mean weight is 1")
        return self


class Train(Section):
    mode: Literal["full", "lora", "qlora"] = "full"
    """All weights, LoRA adapters, or LoRA adapters on a base in 4 bits (bitsandbytes NF4, double quantisation)."""
    bnb_4bit_quant_storage: DType | None = None
    """qlora: the type that holds the packed 4-bit weights; must be `dtype`. Setting it allows ZeRO-3."""
    deepspeed: str = "zero3.json"
    """DeepSpeed config: the name of one that comes with the package, or a path with a folder in it. Its `auto` values
    are filled from this recipe."""
    dtype: DType = "bfloat16"
    """bfloat16 keeps fp32 master weights in the optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW. LoRA takes about ten times that of full training."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Times that every training example is seen; a fraction is allowed."""
    warmup_ratio: Fraction = 0.03
    """Share of the optimizer steps in which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0: they are not."""
    train_batch_size: Positive = 32
    """Examples an optimizer step, over all ranks. The same on any world size."""
    per_device_train_batch_size: Positive = 8
    """Examples a micro-batch on one rank; gradient accumulation follows from the two."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more work."""
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = "auto"
    """Attention kernels of training; `auto` is what transformers chooses, mostly `sdpa`. `flash_attention_2` (a package
    of its own) and `flex_attention` need a GPU. Scoring and evaluation have those of `auto`, which take every mask."""
    torch_compile: bool = False
    """Compile each layer with torch.compile: a minute or more at the start, then faster steps on most GPUs (slower ones
    were measured on CPUs). Not under ZeRO-3."""
    loss: Loss = "cross_entropy"
    """`gce` (generalised cross-entropy) and `dft` learn less from labels that the model finds unlikely."""
    gce_q: Annotated[float, Field(gt=0, le=1)] = 0.7
    """`gce`: near 0 it is the cross-entropy, at 1 the mean absolute error."""
    loss_warmup_ratio: Fraction = 0.5
    """`gce` and `dft`: share of the steps that train on the cross-entropy first (the papers have none)."""
    reduction: Literal["example", "token"] = "example"
    """Divide the weighted sum by the number of examples, or of label tokens, of the global batch."""
    lora_r: Positive = 16
    """Rank of the LoRA adapters."""
    lora_alpha: Positive = 32
    """The adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    lora_target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters, or `all-linear`."""
    logging_steps: Positive = 10
    """In a batch job, one log line every so many steps (log.jsonl gets every step)."""
    eval_steps: Positive | None = None
    """Dev loss every so many steps; without it, once an epoch."""
    save_steps: Positive | None = None
    """Checkpoint every so many steps; without it, once an epoch."""
    save_total_limit: Positive = 1
    """Checkpoints to keep an arm."""
    metric_for_best_model: Literal["loss", "accuracy", "macro_f1"] = "loss"
    """What makes a model `best`: the lowest dev loss, or, for tasks with a label set, the highest score on the dev
    examples. Every evaluation then ranks all labels for every dev example."""
    early_stopping_patience: Positive | None = None
    """End a training that has had no better model (see `metric_for_best_model`) for so many evaluations in a row.
    `last` is then the model of that step."""
    profile_steps: Positive | None = None
    """Profile so many steps, from the fourth on, into profile/: a trace, and the operators that took longest."""
    max_skipped_steps: Positive = 5
    """A step without a finite loss or gradient is skipped and counted; this many in a row end the run."""

    @model_validator(mode="after")
    def _batches(self) -> Train:
        if self.per_device_train_batch_size > self.train_batch_size:
            raise ValueError("`per_device_train_batch_size` is larger than `train_batch_size`")
        return self

    @model_validator(mode="after")
    def _quant_storage(self) -> Train:
        if self.bnb_4bit_quant_storage is not None:
            if self.mode != "qlora":
                raise ValueError("`bnb_4bit_quant_storage` is for mode: qlora")
            if self.bnb_4bit_quant_storage != self.dtype:
                raise ValueError("`bnb_4bit_quant_storage` must be `dtype`: ZeRO-3 shards weights of one type together")
        return self


class Arm(Section):
    weights: Weights | None = None
    """Weights of this arm; without it the recipe's own `weights`."""
    drop_lowest: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hard selection: leave out this share of the examples, those of the lowest weights; the others count alike."""
    drop_ids: str | None = None
    """File of example ids, one a line, that this arm leaves out: what an annotator or another tool found wrong."""
    gold: bool = False
    """Train on the gold labels: what noise-free data would give."""
    dev: Literal["mixed", "last", "alone"] | None = None
    """Train on the gold labels of the dev split, too: `mixed` among the training examples, each with the mean weight of
    those that the arm keeps; `last`: alone after them, with a learning rate schedule of its own; `alone`: on nothing
    else. Such arms have no dev loss."""
    loss: Loss | None = None
    """Loss of this arm; without it `train.loss`."""


DEFAULT_ARMS = {"sft": Arm(weights=Weights(formula="uniform")), "atlantis": Arm()}


class Evaluate(Section):
    method: Literal["rank", "generate"] = "rank"
    """Rank all labels by log-likelihood, or generate greedily and map the text to a label."""
    checkpoint: Literal["last", "best"] = "last"
    """The model at the end of training, or the best by `train.metric_for_best_model`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """As `score.dtype`."""
    tokens_per_batch: Positive = 4096
    """Token budget of one batch."""
    max_new_tokens: Positive = 32
    """For `generate`, and for responses (default there: 256)."""
    answer: str | None = None
    """responses: a regular expression; only what it captures is compared, e.g. `#### (.*)`."""

    @model_validator(mode="after")
    def _answer_captures(self) -> Evaluate:
        if self.answer is not None:
            try:
                groups = re.compile(self.answer).groups
            except re.error as error:
                raise ValueError(f"`answer` is not a regular expression: {error}") from None
            if groups < 1:
                raise ValueError("`answer` must capture something: put ( ) around the part that is compared")
        return self


def _task_of(tree: Any) -> Any:
    """The task of a recipe's ``data`` section before it is validated; None where that is not a section at all."""
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
"""What a recipe for responses has where it says nothing: sums over hundreds of tokens make no weights."""


SbatchValue = str | int | bool | None
OF_THE_CHAIN = {"array", "dependency", "job-name", "kill-on-invalid-dep", "output", "parsable", "wait", "wrap"}


def _sbatch_options(options: dict[str, SbatchValue]) -> dict[str, SbatchValue]:
    for key in options:
        if not re.fullmatch(r"[a-z][a-z0-9-]+", key):
            raise ValueError(f"{key!r} is no long option of sbatch; write it without dashes before it, as `qos`")
        if key in OF_THE_CHAIN:
            raise ValueError(f"`{key}` is decided by the chain of jobs")
    return options


Sbatch = Annotated[dict[str, SbatchValue], AfterValidator(_sbatch_options)]


class Slurm(Section):
    all: Sbatch = {}
    """Options of sbatch for every job that `submit` makes: `{account: abc, mail-user: me@example.org}`. `true` gives an
    option without a value, nothing (`null`) takes one away."""
    prepare: Sbatch = {}
    """For the jobs of one stage, as `{partition: cpu, time: "01:00:00"}`."""
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
    """Of data, noise, folds and scores; and of training, but for `compare`."""
    data: Data
    """What is trained and tested on."""
    prompt: Prompt = Prompt()
    """What the models read before a label or response."""
    models: Models
    """The three frozen models that score; the first is trained, too."""
    score: Score = Score()
    """How the training examples are scored."""
    weights: Weights = Weights()
    """How scores become one weight an example."""
    train: Train = Train()
    """How the large model (and a fine-tuned reference) is trained."""
    arms: dict[str, Arm] = DEFAULT_ARMS
    """What to train and compare. Every arm shares data order, schedule and reduction."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2, 3, 4]
    """`compare` trains every arm once with each: order of the data, adapters, dropout."""
    evaluate: Evaluate = Evaluate()
    """How the test examples are predicted."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Where figures go beside log.jsonl; each is an extra of the package. A tracker that fails ends no training."""
    slurm: Slurm = Slurm()
    """What your site wants of jobs, for `submit`."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0
    """A rank that waits longer than this for the others ends the run."""

    @property
    def task(self) -> Task:
        return self.data.kind

    @property
    def weighted(self) -> bool:
        """Whether an arm needs scores; where all weights are uniform, none does."""
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
        if self.score.label_set:
            raise ValueError("`score.label_set: true` needs a label set; responses have none")
        return self

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for kind, name in [("name", self.name), *(("arms", arm) for arm in self.arms)]:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"`{kind}`: {name!r} names a folder: use letters, digits, `-`, `_` and `.`")
        if not self.arms:
            raise ValueError("`arms` is empty")
        if reserved := [arm for arm in self.arms if arm.startswith("reference")]:
            raise ValueError(f"`arms.{reserved[0]}`: names that start with `reference` are kept for the reference")
        return self

    @model_validator(mode="after")
    def _arms_can_work(self) -> Recipe:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds`: one stands twice in {self.seeds}")
        for arm, options in self.arms.items():
            weights = options.weights or self.weights
            if options.drop_lowest and weights.formula == "uniform":
                raise ValueError(f"`arms.{arm}.drop_lowest`: uniform weights have no lowest ones; give it `weights`")
            if options.dev == "alone" and (options.gold or options.drop_lowest or options.drop_ids or options.weights):
                raise ValueError(
                    f"`arms.{arm}.dev: alone` trains on no training example; leave out `weights`, `gold`, "
                    "`drop_lowest` and `drop_ids`"
                )
            if options.gold and weights.formula != "uniform":
                raise ValueError(
                    f"`arms.{arm}.gold`: these weights are of the labels that the run trains on, not of the gold ones; "
                    "give it `weights: {formula: uniform}`"
                )
        every = {"weights": self.weights} | {f"arms.{a}.weights": o.weights for a, o in self.arms.items() if o.weights}
        for key, weights in every.items():
            posterior = weights.base_formula == "posterior"
            if posterior and weights.calibrate != "none":
                raise ValueError(f"`{key}.calibrate`: the posterior compares labels by itself; take `none`")
            if (posterior or weights.calibrate == "label_set") and not self.score.label_set:
                option = "formula: posterior" if posterior else "calibrate: label_set"
                raise ValueError(f"`{key}.{option}` needs `score.label_set: true`")
        return self

    @model_validator(mode="after")
    def _scratch_goes_with_grammar(self) -> Recipe:
        for name in ("large", "small"):
            if self.data.format != "grammar" and getattr(self.models, name).scratch:
                raise ValueError(f"`models.{name}.scratch` is for data.format: grammar; give `model_name_or_path`")
        return self
