//! A thread of a program: registers, signals, and the vCPU that it runs, if it runs one.

use super::context::{FpState, UserContext};
use super::signal::ThreadSignals;
use crate::kvm::run::Entry;

/// A thread.
#[derive(Debug, Default)]
pub struct Thread {
    /// Its number.
    pub id: u64,
    /// Its registers.
    pub context: UserContext,
    /// Its FP/SIMD registers, while no CPU has them.
    pub fp: FpState,
    /// What it blocks, and what was sent to it.
    pub signals: ThreadSignals,
    /// Where a zero is written when it ends, and a waiter woken (`set_tid_address`); 0: nowhere.
    pub clear_at_end: u64,
    /// Its `KVM_RUN` is under way, and this is what EL2 is asked next.
    pub entry: Option<Entry>,
}

impl Thread {
    /// The first thread of a program.
    pub fn first(id: u64, pc: u64, sp: u64) -> Self {
        Self { id, context: UserContext::new(pc, sp), ..Self::default() }
    }

    /// What a system call of its returns.
    pub fn set_result(&mut self, result: Result<u64, crate::errno::Errno>) {
        self.context.x[0] = result.unwrap_or_else(crate::errno::Errno::to_word);
    }
}
