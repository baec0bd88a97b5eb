"""What dispatch and combine would do on a cluster, before anyone buys it.

    from ep_comm import plan

    prefill = plan.PRESETS["prefill"]
    told = plan.predict(prefill, plan.Hardware(nic_gbps=100.0))
    told.dispatch.time_us, told.dispatch.bound, told.dispatch.sms_needed, told.memory.staging_bytes

Bytes are counted link by link from the routing; a time is the slowest link's, plus what an
operation costs without any bytes. Rates are measured ones (`Hardware`). What the model leaves out
makes real times longer, never shorter: `predict` says what.
"""

from ep_comm.plan.deployment import PRESETS, Deployment
from ep_comm.plan.hardware import Hardware
from ep_comm.plan.memory import Memory
from ep_comm.plan.model import Operation, Plan, predict
from ep_comm.plan.report import curve, draw, tables
from ep_comm.plan.visits import Visits, visits

__all__ = [
    "Deployment",
    "Hardware",
    "PRESETS",
    "predict",
    "Plan",
    "Operation",
    "Memory",
    "visits",
    "Visits",
    "curve",
    "tables",
    "draw",
]
