"""The application's sections of settings; each field with its bounds, its unit and a sentence. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from mixcl_dist.data_shards.storage.store import CacheConfig


def _whole(least: int, most: int) -> Any:
    """A whole number; `true` and 3.0 are none."""
    return Field(ge=least, le=most, strict=True)


def _distinct(values: tuple) -> tuple:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{repeated[0]} comes twice; leave one out")
    return values


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError(f"{values[0]:g} is above {values[1]:g}; give the lower one first")
    return values


def _window(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] == values[1]:
        raise ValueError(f"both edges are {values[0]:g}; give the lower one and a higher one")
    return _ordered(values)


Architecture = Literal["dynunet", "residual_dynunet", "resenc_unet", "segresnet", "swin_unetr"]
Fraction = Annotated[float, Field(ge=0, le=1)]
SomeFraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Temperature = Annotated[float, Field(gt=0, le=100)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
WeightDecay = Annotated[float, Field(ge=0, le=100)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
HU = Annotated[float, Field(ge=-32768, le=32767)]
SpreadHU = Annotated[float, Field(ge=0, le=32767)]
SpacingMm = Annotated[float, Field(gt=0, le=1000)]
Count = Annotated[int, _whole(1, 10**6)]
Steps = Annotated[int, _whole(1, 10**8)]
StepsOrNever = Annotated[int, _whole(0, 10**8)]
Seed = Annotated[int, _whole(0, 2**32 - 1)]
Width = Annotated[int, _whole(1, 2**16)]
Edge = Annotated[int, _whole(1, 4096)]
Size3 = tuple[Edge, Edge, Edge]
Names = Annotated[tuple[str, ...], AfterValidator(_distinct)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]
ScanCounts = Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_distinct)]


@dataclass(frozen=True)
class DataConfig:
    """How patches are streamed from shards."""

    workers: Annotated[int, _whole(0, 1024)] = 1
    """Processes of each rank that read and decode; the order of samples does not depend on it."""
    labelled_fraction: Fraction | None = None
    """Share of every batch that shows cases of the label budget, held exactly; None draws all cases alike."""
    class_aware: bool = True
    """Within that share every annotated class is shown equally often."""
    upsampling: dict[str, Annotated[float, Field(gt=0, le=1000)]] = field(default_factory=dict)
    """Data set → how often its patches come in an epoch, e.g. {rare: 4}; 1 where it is not named."""
    max_bad_fraction: Fraction = 0.001
    """Share of samples that may turn out unreadable, and be replaced, before the run stops."""
    cache: CacheConfig | None = None
    """Where to keep what was read from a remote store, e.g. {folder: /scratch/mixcl, max_bytes: 200000000000}."""


@dataclass(frozen=True)
class NetworkConfig:
    """The encoder-decoder that is pre-trained and fine-tuned."""

    architecture: Architecture = "dynunet"
    """MONAI's DynUNet, plain or with residual blocks, SegResNet or SwinUNETR, or nnU-Net's U-Net with a residual
    encoder (needs the extra `nnunet`)."""
    filters: Annotated[tuple[Width, ...], Field(min_length=3, max_length=8)] = (16, 32, 64, 128)
    """Channels of each resolution level; each level halves the resolution of the one before. 32,64,128,256,320,320 of
    resenc_unet are nnU-Net's plan L."""
    voxel_dim: Width = 64
    """Width D of a voxel row's embedding."""
    crop_dim: Width = 64
    """Width of a crop row's embedding."""
    kernel_spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | None = None
    """Spacing of the voxels (mm) that kernels and strides are made for: along an axis that is at least twice as coarse
    as the finest they are 1, level by level until the others have caught up, as nnU-Net plans it; None: 3 and 2."""
    window_hu: Annotated[tuple[HU, HU], AfterValidator(_window)] = (-1000.0, 1000.0)
    """HU that the network's input range [-1, 1] stands for; values outside are clipped."""

    def __post_init__(self) -> None:
        if self.kernel_spacing_mm and self.architecture in ("segresnet", "swin_unetr"):
            cure = "leave it out, or choose dynunet, residual_dynunet or resenc_unet"
            raise ValueError(f"kernel_spacing_mm: {self.architecture} has kernels of one form; {cure}")
        first, shown = self.filters[0], ",".join(map(str, self.filters))
        if self.architecture == "segresnet" and (
            first % 8 or list(self.filters) != [first * 2**level for level in range(len(self.filters))]
        ):
            raise ValueError(f"filters {shown}: segresnet doubles a multiple of 8, as in 16,32,64,128")
        if self.architecture == "swin_unetr" and (
            first % 12 or list(self.filters) != [first, *(first * 2**level for level in range(5))]
        ):
            raise ValueError(
                f"filters {shown}: swin_unetr has f,f,2f,4f,8f,16f, f a multiple of 12: 24,24,48,96,192,384"
            )


@dataclass(frozen=True)
class ViewsConfig:
    """Two overlapping degraded views of every patch, made on the device."""

    size: Size3 = (32, 32, 32)
    """Voxels of a view; a patch on disk is at least as large."""
    min_overlap: Fraction = 0.4
    """Smallest share of a view's voxels that also lie in its partner (before rotation and scaling)."""
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Largest turn about a random axis, in degrees."""
    scale: Annotated[tuple[Zoom, Zoom], AfterValidator(_ordered)] = (0.9, 1.1)
    """Smallest and largest factor by which a view shows more of the patch than its own size."""
    mask_fraction: Fraction = 0.3
    """Share of a view's blocks that are masked."""
    mask_block: Edge = 8
    """Edge of a masked cube in voxels."""
    noise_hu: SpreadHU = 30.0
    """Largest standard deviation of the noise in HU."""
    blur_sigma: Annotated[float, Field(ge=0, le=64)] = 1.0
    """Largest standard deviation of the blur in voxels."""
    low_resolution: Annotated[float, Field(ge=1, le=64)] = 2.0
    """Largest factor by which resolution is lowered."""
    shift_hu: SpreadHU = 50.0
    """Largest shift of all values in HU, up or down."""


@dataclass(frozen=True)
class RowsConfig:
    """Which voxels become rows of the contrastive loss."""

    per_view_pair: Count = 256
    """Points of a patch that both its views see; each gives two rows."""
    border_fraction: Fraction = 0.5
    """Share of points drawn near organ borders, where labels exist."""
    min_spacing: Annotated[int, _whole(1, 64)] = 2
    """Smallest distance between two points of a patch along some axis, in voxels; at most one voxel in
    (2 · min_spacing − 1)³ can then be a point."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and temperatures of the three consistencies; 0 switches a term off."""

    voxel_identity: Weight = 1.0
    """Weight: a voxel and its twin in the other view agree."""
    voxel_label: Weight = 1.0
    """Weight: voxels of one class agree; without cases in the label budget nothing is learned from it."""
    crop_identity: Weight = 0.25
    """Weight: both views of a patch agree as wholes."""
    reconstruction: Weight = 1.0
    """Weight: the clean view is restored from the degraded one."""
    contrast: Literal["global", "rank"] = "global"
    """With whose rows a row contrasts: those of all ranks, so that the loss is that of the whole batch at any number of
    ranks, or those of its own rank, which then has nothing to wait for."""
    voxel_temperature: Temperature = 0.1
    """Divides the cosines of voxel rows."""
    crop_temperature: Temperature = 0.2
    """Divides the cosines of crop rows."""
    reconstruction_beta: Annotated[float, Field(gt=0, le=2)] = 0.05
    """Error at which smooth-L1 turns from squares to absolute values, in the network's input range: 0.05 is 50 HU of a
    window of 2,000. At 1 the term's gradient on the backbone was a thirtieth of the others'."""
    masked_weight: Weight = 4.0
    """Weight of a masked voxel in the reconstruction, where an unmasked one has 1."""

    def __post_init__(self) -> None:
        if not (self.voxel_identity or self.voxel_label or self.crop_identity or self.reconstruction):
            raise ValueError("every weight is 0, so nothing would be learned; give one term a weight")

    def single_terms(self) -> dict[str, ObjectiveConfig]:
        """Each term that has a weight, and this objective with that term alone."""
        terms = ("voxel_identity", "voxel_label", "crop_identity", "reconstruction")
        weights = {term: weight for term in terms if (weight := getattr(self, term))}
        off = dict.fromkeys(terms, 0.0)
        return {term: dataclasses.replace(self, **(off | {term: weight})) for term, weight in weights.items()}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: LearningRate = 1e-3
    """Highest one of the schedule, change of a weight a step."""
    weight_decay: WeightDecay = 1e-4
    """Share of a weight that a step at learning rate 1 takes away."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay a step of the averages of the gradient and of its square."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the learning rate rises."""
    final_fraction: Fraction = 0.01
    """Learning rate at the end, as a share of the highest."""


@dataclass(frozen=True)
class BudgetConfig:
    """Whose pixel labels may be used: the first training cases, by share or number, of an order drawn from `seed`."""

    fraction: Fraction = 0.0
    """Share of the labelled training cases of a data set, rounded up."""
    seed: Seed = 0
    """Number of the order that cases are taken in."""
    full_datasets: Names = ()
    """Data sets all of whose training labels may be used, because another one is to be fine-tuned on."""
    scans: Count | None = None
    """Number of labelled scans of a data set, instead of `fraction`."""
    development: Names = ()
    """Training cases kept back, neither trained on nor in any budget: every choice is made by their scores."""
    classes: Names | None = None
    """Classes whose labels may be read; voxels of others look as if nobody had annotated them. None: all."""
    distinct_patients: tuple[tuple[str, str], ...] = ()
    """Pairs [case, scan as a start or shards name it] that look like one scan, and that a person has looked at and
    found to be of two patients: no leak then. Scans of the same voxels are one whatever is written here."""

    def __post_init__(self) -> None:
        if self.fraction and self.scans is not None:
            raise ValueError(f"fraction {self.fraction:g} and scans {self.scans} are both given; set one of them")


@dataclass(frozen=True)
class PretrainConfig:
    """How long pre-training learns, and what it leaves on the way."""

    steps: Steps = 1000
    """Optimizer steps."""
    batch_size: Count = 8
    """Patches in a global batch, over all ranks and accumulation steps."""
    seed: Seed = 0
    """Number that the first weights, the order of patches and all augmentation follow from."""
    log_every: Steps = 10
    """Steps between lines of metrics."""
    max_hours: Annotated[float, Field(gt=0, le=8760)] | None = None
    """Hours after which a start saves its step and ends with exit code 75, as by a signal, to be started again: fewer
    than the scheduler's limit by what a step and a checkpoint take. None sets no limit."""
    max_skipped: Count = 10
    """Steps in a row that may be left out, as their gradient is not finite, before the run stops."""
    rewind_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Factor of the learning rate at which a run then goes on by itself from the checkpoint before those steps, up to
    three times, instead of stopping; None: it stops."""
    sample_every: Steps = 200
    """Steps between the pictures kept for the report."""
    probe_every: StepsOrNever = 0
    """Steps between two probes of the features on the development scans, one of them at the end; 0: never."""
    gradient_norms_every: StepsOrNever = 50
    """Steps between two measurements of each term's gradient norm on the backbone, and of how far the voxel rows are
    spread; such a step takes as long as four. 0 measures never."""
    trackers: Annotated[tuple[Literal["mlflow", "wandb"], ...], AfterValidator(_distinct)] = ()
    """What is told the figures and settings, beside TensorBoard: MLflow's server at MLFLOW_TRACKING_URI, or Weights &
    Biases, in the run's folder alone, which `wandb sync` may send (extras `mlflow`, `wandb`). No names are told."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a trial learns to segment, and how it is scored."""

    steps: Steps = 300
    """Optimizer steps."""
    batch_size: Count = 2
    """Crops of a step. On a CPU without bfloat16 a step of one takes longer than a step of two: torch has no quick
    convolution for it."""
    patch_size: Size3 = (48, 48, 48)
    """Voxels of a training crop, and of a window of the sliding inference."""
    spacing_mm: tuple[SpacingMm, SpacingMm, SpacingMm] | None = None
    """Spacing in mm to resample to; None takes that of the pre-trained network's shards, or keeps the case's own."""
    learning_rate: LearningRate = 2e-3
    """Highest one of the schedule, change of a weight a step."""
    weight_decay: WeightDecay = 1e-4
    """Share of a weight that a step at learning rate 1 takes away."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps in which the learning rate rises."""
    coarse_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the steps over which the classifiers of coarser levels, which help that of the finest, fade out."""
    level_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each level of the backbone learns at this factor of the learning rate of the level nearer to the classifier."""
    average_decay: BelowOne = 0.99
    """Share that each step keeps of the moving average of the weights, which is scored; 0 keeps the last weights."""
    curve_every: Steps = 250
    """Steps between points of the curve of Dice on the first `curve_scans` development scans."""
    curve_scans: Count = 6
    """Development scans that the curve is of."""
    classes: Names | None = None
    """Classes to learn and score, of those in the budget; None: all."""
    sliding_overlap: BelowOne = 0.25
    """Smallest share of a window's edge that it has in common with the next one."""
    surface_tolerance_mm: Annotated[float, Field(ge=0, le=1000)] = 3.0
    """Distance in mm up to which two surfaces count as one in the surface Dice."""
    log_every: Steps = 10
    """Steps between lines of metrics."""


@dataclass(frozen=True)
class StudyConfig:
    """The table of trials: starts × label fractions × subset seeds × searched values."""

    fractions: Annotated[tuple[SomeFraction, ...], Field(min_length=1), AfterValidator(_distinct)] = (0.05, 0.15)
    """Shares of the labelled training cases, each a column of the table."""
    seeds: Seeds = (0, 1, 2)
    """Numbers of the orders that cases are taken in, each a subset of every share."""
    search: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Searched values by configuration key: {grid: [values]}, {choice: [values]}, {uniform: [low, high]},
    {loguniform: [low, high]} or {randint: [low, high]}, e.g. {finetune.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}};
    with `when: {key: value}` only where another searched key, before it, has that value."""
    samples: Count = 1
    """Draws from the search space for each trial of the table."""
    method: Literal["random", "tpe"] = "random"
    """How points are chosen: at random, or by Optuna's tree-structured Parzen estimator from how the others ended."""
    objectives: Annotated[tuple[Literal["dice", "seconds"], ...], Field(min_length=1), AfterValidator(_distinct)] = (
        "dice",
    )
    """What tpe looks at: mean Dice, the higher the better, and seconds of a trial, the fewer the better."""
    stopping: Literal["none", "asha", "median"] = "none"
    """Ends trials early that fall behind others in Dice on the first `finetune.curve_scans` development scans."""
    grace_steps: Steps = 250
    """Steps after which a trial may first be stopped; a multiple of `finetune.curve_every`."""
    reduction: Annotated[float, Field(ge=1.5, le=100)] = 3.0
    """ASHA looks after so many times as many steps again and again, and goes on with the best of so many trials."""
    smallest_difference: Annotated[float, Field(ge=0, le=1)] | None = None
    """Difference in Dice below which it does not matter which arm is better: a fraction's other seeds are left out once
    its paired differences tell, at every look with 95 % confidence; None runs them all."""


@dataclass(frozen=True)
class StageConfig:
    """A pre-training that arms of a few-label table start from."""

    start: str | None = None
    """Stage that this one goes on from; None begins with random weights."""
    labels: Literal["none", "budget", "all"] = "none"
    """Whose pixel labels it reads: nobody's, so that it is run once; those of a trial's scans, so that it is run for
    each (scans, seed); or those of a fold's known organs in all scans, so that it is run for each fold."""
    supervised: bool = False
    """Trains a segmentation of those labels instead of the objective."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings by dotted key that differ from the recipe's, e.g. {objective.voxel_label: 0}."""


@dataclass(frozen=True)
class ArmConfig:
    """What a table compares: how its trials start. Fine-tuning is the same for every arm."""

    stage: str | None = None
    """Pre-training that the trials start from; None starts from scratch."""
    voxels_of: str | None = None
    """Stage whose voxels, with those of the stages before it, are added to the trials' own: they take as many steps
    more as show the network equally many voxels."""


@dataclass(frozen=True)
class FoldConfig:
    """Organs that are labelled everywhere, and organs to be learnt from few scans."""

    known: Names
    """Classes that pre-training reads in all scans."""
    new: Names
    """Classes that trials learn from few scans."""


@dataclass(frozen=True)
class OtherOrgansConfig:
    """The second block of a table: pre-train with the labels of known organs in all scans, fine-tune on new ones."""

    folds: dict[str, FoldConfig] = field(default_factory=dict)
    """Name → which organs are known and which are new."""
    scans: ScanCounts = (1, 2)
    """Numbers of labelled scans."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """Name → how its trials start."""
    compared: tuple[tuple[str, str], ...] = ()
    """Pairs [arm, reference] that are compared, beside every arm with scratch."""


@dataclass(frozen=True)
class TableConfig:
    """The few-label table: arms × labelled scans × subset seeds, and the same for other organs."""

    scans: ScanCounts = (1, 2, 4, 9)
    """Numbers of labelled scans."""
    seeds: Seeds = tuple(range(10))
    """Subsets of scans, fixed beforehand."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Name → a pre-training."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """Name → how its trials start."""
    compared: tuple[tuple[str, str], ...] = ()
    """Pairs [arm, reference] that are compared, beside every arm with scratch."""
    other_organs: OtherOrgansConfig = field(default_factory=OtherOrgansConfig)
    first_scans: Annotated[tuple[Count, ...], AfterValidator(_distinct)] = (1, 2)
    """Numbers of labelled scans of the cells that tell most, which are run before all others."""
    first_arms: Names = ("scratch", "mixcl")
    """The arms of those cells."""
    baselines: Names = ("random", "reconstruction")
    """Stages whose probe every other pre-training has to beat before trials start from it, random weights among them;
    none lifts the gate."""
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.02
    """Dice of the linear probe by which it has to be beaten."""
    final: bool = True
    """Score the trials on validation scans, after which nothing is chosen; false scores them on the development scans,
    for choosing between recipes."""
    resamples: Count = 10_000
    """Bootstrap resamples, of seeds and of cases, for the standard error of a difference."""
