"""The kernel that `mig-kit run` starts: this Python, whatever kernel specs lie on Jupyter's path.

A spec called python3 may be of another environment, and would run another copy of the kit.
"""

import sys

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager


class ThisPython(AsyncKernelManager):
    """Starts ipykernel with the Python that runs this process."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The only one."""
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
                                "{connection_file}"], display_name="Python 3", language="python")
