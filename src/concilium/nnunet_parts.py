"""Every name of nnU-Net and its packages that Concilium uses. No other module imports them (import-linter holds it).

A new release of `nnunetv2` is checked here, line by line; its version is bounded in `pyproject.toml`.
"""

from __future__ import annotations

from unittest import mock

with mock.patch(
    "matplotlib.use"
):  # its logger would take agg here, for all: a notebook would show no figure after a run
    import nnunetv2.training.logging.nnunet_logger  # noqa: F401

# batches
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

# networks
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU

# planning
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

# files
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

# prediction
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

# preprocessing
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

# training
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

__all__ = [
    "ConvDropoutNormReLU",
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "DefaultPreprocessor",
    "ExperimentPlanner",
    "GaussianBlurTransform",
    "MemoryEfficientSoftDiceLoss",
    "NaturalImage2DIO",
    "PlainConvUNet",
    "PlansManager",
    "ResidualEncoderUNet",
    "SimpleITKIO",
    "Tiff3DIO",
    "compute_steps_for_sliding_window",
    "convert_predicted_logits_to_segmentation_with_correct_shape",
    "crop_and_pad_nd",
    "crop_to_nonzero",
    "default_experiment_planner",
    "generate_crossval_split",
    "get_network_from_plans",
    "get_pool_and_conv_props",
    "nnUNetDataLoader",
    "nnUNetPlannerResEncL",
    "nnUNetPlannerResEncM",
    "nnUNetPlannerResEncXL",
    "nnUNetPredictor",
    "nnUNetTrainer",
    "trainer_module",
]
