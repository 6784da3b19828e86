"""convexlearn: decision rules tuned from data."""

from convexlearn import errors, flows, networks, objectives, simulate
from convexlearn.chain import ChainFactors
from convexlearn.convolution import Convolution
from convexlearn.denoisers import Denoiser, DnCNN
from convexlearn.diagnose import Diagnosis, diagnose
from convexlearn.domains import Domain
from convexlearn.evaluate import Evaluation, evaluate
from convexlearn.export import export_c
from convexlearn.gain_networks import GainSignals, RecurrentGain
from convexlearn.history import History
from convexlearn.iterations.admm import ADMM
from convexlearn.iterations.amp import AMP
from convexlearn.iterations.primal_dual import PrimalDual
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.iterations.robust_pca import RobustPCA, principal_component_pursuit, robust_pca
from convexlearn.layer import ConvexLayer, LayerSolution
from convexlearn.optimizers import ProximalGradient, ProximalTerm
from convexlearn.program.program import Status
from convexlearn.riccati import dare, dlyap, lqr_gain
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.base import DecisionRule, as_rule
from convexlearn.rules.channel_factors import ChannelFactor, LearnedFactor, Trellis
from convexlearn.rules.convex import ConvexRule
from convexlearn.rules.deep_prior import DeepPrior
from convexlearn.rules.extended_kalman import ExtendedKalmanFilter
from convexlearn.rules.feasible import FeasibleRule
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.lqg import LQG, LQR
from convexlearn.rules.neural import NeuralRule
from convexlearn.rules.output_feedback import OutputFeedback
from convexlearn.rules.parameters import Role
from convexlearn.rules.policies import adp, mpc
from convexlearn.rules.smoother import KalmanSmoother
from convexlearn.rules.sum_product import SumProduct
from convexlearn.rules.tree import TreeRule
from convexlearn.saving import load, save
from convexlearn.simulate.base import Simulator, Trajectory
from convexlearn.splitting import Split, split
from convexlearn.tune import tune

__version__ = "0.1.0"
__all__ = [
    "ADMM",
    "AMP",
    "FISTA",
    "ISTA",
    "LQG",
    "LQR",
    "AffineRule",
    "ChainFactors",
    "ChannelFactor",
    "Converged",
    "ConvexLayer",
    "ConvexRule",
    "Convolution",
    "DecisionRule",
    "DeepPrior",
    "Denoiser",
    "Diagnosis",
    "DnCNN",
    "Domain",
    "Evaluation",
    "ExtendedKalmanFilter",
    "FeasibleRule",
    "GainSignals",
    "History",
    "KalmanFilter",
    "KalmanSmoother",
    "LayerSolution",
    "LearnedFactor",
    "NeuralRule",
    "OutputFeedback",
    "PrimalDual",
    "ProximalGradient",
    "ProximalTerm",
    "RecurrentGain",
    "RobustPCA",
    "Role",
    "Simulator",
    "Split",
    "Status",
    "SumProduct",
    "Trajectory",
    "TreeRule",
    "Trellis",
    "Unfolded",
    "adp",
    "as_rule",
    "dare",
    "diagnose",
    "dlyap",
    "errors",
    "evaluate",
    "export_c",
    "flows",
    "load",
    "lqr_gain",
    "mpc",
    "networks",
    "objectives",
    "principal_component_pursuit",
    "robust_pca",
    "save",
    "simulate",
    "split",
    "tune",
]
