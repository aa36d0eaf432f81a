"""A question to all processes, answered one call late so that nobody waits: has any of them said yes?"""

from __future__ import annotations

import threading
from queue import SimpleQueue

import torch
import torch.distributed as dist

from lars.run.peers import Peers


class Vote:
    """Yes if anybody says yes, in ceil(log2 W) rounds of one small message each, beside the pass that is played.

    In round k each process tells rank + 2^k what it knows and hears rank - 2^k (the dissemination barrier of Hensgen,
    Finkel and Manber 1988). An all-reduce over gloo's ring would take 2 (W - 1) hops one after another: at 2,048
    processes longer than a pass.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.questions: SimpleQueue[bool] = SimpleQueue()
        self.answers: SimpleQueue[bool | Exception] = SimpleQueue()
        self.answers.put(False)  # before the first call nobody has said yes
        if peers.processes > 1:
            threading.Thread(target=self._answer, daemon=True).start()

    def cast(self, yes: bool) -> bool:
        """By all processes equally often: the answer to the call before (at the first one, no).

        Raises:
            RuntimeError: a process is gone.
        """
        if self.peers.processes == 1:
            return yes
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        self.questions.put(yes)
        return answer

    def _answer(self) -> None:
        rank, processes, group = self.peers.rank, self.peers.processes, self.peers.group
        known, heard = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
        while True:
            known.fill_(self.questions.get())
            try:
                for number, distance in enumerate(2**k for k in range((processes - 1).bit_length())):
                    sent = dist.isend(known, (rank + distance) % processes, group, tag=number)
                    dist.recv(heard, (rank - distance) % processes, group, tag=number)
                    sent.wait()
                    known |= heard
                self.answers.put(bool(known))
            except Exception as error:  # told to whoever asks next
                self.answers.put(error)
                return
