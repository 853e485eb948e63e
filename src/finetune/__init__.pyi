"""The public names with their types. At run time `__init__.py` imports them when first used."""

from finetune.arguments import TrainingArguments as TrainingArguments
from finetune.arguments import parse_arguments as parse_arguments
from finetune.cli.datasets import get_dataset as get_dataset
from finetune.cli.datasets import load_datasets as load_datasets
from finetune.cli.programs import check_before_start as check_before_start
from finetune.cli.programs import finish_program as finish_program
from finetune.cli.programs import run_program as run_program
from finetune.cli.script_arguments import DatasetConfig as DatasetConfig
from finetune.cli.script_arguments import DatasetMixtureConfig as DatasetMixtureConfig
from finetune.cli.script_arguments import ModelConfig as ModelConfig
from finetune.cli.script_arguments import ScriptArguments as ScriptArguments
from finetune.cli.script_arguments import get_peft_config as get_peft_config
from finetune.cli.script_arguments import get_quantization_config as get_quantization_config
from finetune.cli.script_arguments import with_model_options as with_model_options
from finetune.compat import EvalPrediction as EvalPrediction
from finetune.control.builtin import DefaultFlowCallback as DefaultFlowCallback
from finetune.control.builtin import EarlyStoppingCallback as EarlyStoppingCallback
from finetune.control.builtin import PrinterCallback as PrinterCallback
from finetune.control.builtin import ProgressCallback as ProgressCallback
from finetune.control.callbacks import CallbackHandler as CallbackHandler
from finetune.control.callbacks import TrainerCallback as TrainerCallback
from finetune.control.state import ExportableState as ExportableState
from finetune.control.state import TrainerControl as TrainerControl
from finetune.control.state import TrainerState as TrainerState
from finetune.data.chat import apply_chat_template as apply_chat_template
from finetune.data.chat import extract_prompt as extract_prompt
from finetune.data.chat import is_conversational as is_conversational
from finetune.data.chat import is_conversational_from_value as is_conversational_from_value
from finetune.data.chat import maybe_apply_chat_template as maybe_apply_chat_template
from finetune.data.chat import maybe_convert_to_chatml as maybe_convert_to_chatml
from finetune.data.chat import maybe_extract_prompt as maybe_extract_prompt
from finetune.data.collate import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
from finetune.data.mixtures import mix_datasets as mix_datasets
from finetune.data.packing import pack_dataset as pack_dataset
from finetune.data.packing import truncate_dataset as truncate_dataset
from finetune.data.templates import clone_chat_template as clone_chat_template
from finetune.data.templates import get_training_chat_template as get_training_chat_template
from finetune.data.templates import is_chat_template_stop_token_trained as is_chat_template_stop_token_trained
from finetune.engine.sum_metrics import ClassificationMetrics as ClassificationMetrics
from finetune.engine.sum_metrics import SumMetrics as SumMetrics
from finetune.engine.sum_metrics import TokenMetrics as TokenMetrics
from finetune.errors import ArgumentError as ArgumentError
from finetune.errors import CheckpointError as CheckpointError
from finetune.errors import DataFormatError as DataFormatError
from finetune.errors import FinetuneError as FinetuneError
from finetune.errors import ModelLoadError as ModelLoadError
from finetune.errors import NonFiniteLossError as NonFiniteLossError
from finetune.optim.registry import register_optimizer as register_optimizer
from finetune.sequence_classification.config import SequenceClassificationConfig as SequenceClassificationConfig
from finetune.sequence_classification.trainer import SequenceClassificationTrainer as SequenceClassificationTrainer
from finetune.sft.config import SFTConfig as SFTConfig
from finetune.sft.trainer import SFTTrainer as SFTTrainer
from finetune.trainer import Trainer as Trainer

__version__: str
__all__: list[str]
