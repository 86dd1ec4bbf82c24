"""The methods: a file for each, with its equations, arithmetic, citation and defaults.

A new method is one line here.
"""

from optax_sam.methods.ae_looksam import ae_looksam as ae_looksam
from optax_sam.methods.ae_sam import ae_sam as ae_sam
from optax_sam.methods.amp import amp as amp
from optax_sam.methods.asam import asam as asam
from optax_sam.methods.awp import awp as awp
from optax_sam.methods.esam import esam as esam
from optax_sam.methods.fisher_sam import fisher_sam as fisher_sam
from optax_sam.methods.friendly_sam import friendly_sam as friendly_sam
from optax_sam.methods.gam import gam as gam
from optax_sam.methods.gcsam import gcsam as gcsam
from optax_sam.methods.gnp import gnp as gnp
from optax_sam.methods.gsam import gsam as gsam
from optax_sam.methods.gsam import rho_from_lr as rho_from_lr
from optax_sam.methods.le_sam import le_sam as le_sam
from optax_sam.methods.look_layer_sam import look_layer_sam as look_layer_sam
from optax_sam.methods.looksam import looksam as looksam
from optax_sam.methods.mrwp import mrwp as mrwp
from optax_sam.methods.msam import MSAMState as MSAMState
from optax_sam.methods.msam import msam as msam
from optax_sam.methods.msam import msam_eval_params as msam_eval_params
from optax_sam.methods.random_sam import random_sam as random_sam
from optax_sam.methods.renyi_sam import renyi_sam as renyi_sam
from optax_sam.methods.sam import sam as sam
from optax_sam.methods.sam_on import sam_on as sam_on
from optax_sam.methods.sampa import SAMPaState as SAMPaState
from optax_sam.methods.sampa import sampa as sampa
from optax_sam.methods.stable_sam import stable_sam as stable_sam
from optax_sam.methods.vasso import vasso as vasso
from optax_sam.methods.vsam import vsam as vsam
from optax_sam.methods.wsam import WSAMState as WSAMState
from optax_sam.methods.wsam import wsam as wsam
from optax_sam.trajectory.loss import trajectory_loss as trajectory_loss
from optax_sam.trajectory.mesa import MESAState as MESAState
from optax_sam.trajectory.mesa import mesa as mesa
from optax_sam.trajectory.mesa import mesa_params as mesa_params
from optax_sam.trajectory.saf import SAFState as SAFState
from optax_sam.trajectory.saf import saf as saf
from optax_sam.trajectory.saf import saf_past_logits as saf_past_logits
