//! What all parts of the kernel work with: the machine, the frames, the counters.

use abi::HostCall;
use abi::host::HostResult;
use abi::page::Pool;

use crate::errno::Errno;
use crate::machine::{Abort, Machine};
use crate::mm::{Frames, Holder, Pfn};

/// Counts of things that happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Aborts with EL2's mark, of programs and of the kernel.
    pub marked_aborts: u64,
    /// Unshare requests of guests that were served.
    pub unshares: u64,
}

bitflags::bitflags! {
    /// What a hostile host would do, at the wish of a program (research device).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Misbehaviour: u64 {
        /// Acknowledge unshare requests without unmapping the pages.
        const ACKNOWLEDGE_WITHOUT_UNMAPPING = 1 << 0;
        /// Map content without asking the gate.
        const MAP_WITHOUT_ASKING = 1 << 1;
    }
}

/// The kernel's means.
pub struct Host<'m> {
    /// The machine and EL2.
    pub machine: &'m dyn Machine,
    /// Page frames.
    pub frames: Frames,
    /// What happened so far.
    pub counters: Counters,
    /// What to do wrong.
    pub misbehaviour: Misbehaviour,
    next_number: u64,
}

impl core::fmt::Debug for Host<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Host").field("counters", &self.counters).finish_non_exhaustive()
    }
}

/// How often a call may ask for pages before the host gives up.
const SUPPLY_LIMIT: u32 = 64;

impl<'m> Host<'m> {
    /// Begins.
    pub fn new(machine: &'m dyn Machine, frames: Frames) -> Self {
        Self {
            machine,
            frames,
            counters: Counters::default(),
            misbehaviour: Misbehaviour::default(),
            next_number: 1,
        }
    }

    /// A number that no object had before.
    pub fn new_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number = number.wrapping_add(1);
        number
    }

    /// Counts an abort of the kernel's own, if it has EL2's mark.
    pub fn note_abort(&mut self, abort: Abort) {
        if abort.is_from_el2() {
            self.counters.marked_aborts = self.counters.marked_aborts.saturating_add(1);
        }
    }

    /// Takes a frame and fills it with zeros.
    pub fn take_zeroed(&mut self, holder: Holder) -> Result<Pfn, Errno> {
        let frame = self.frames.take(holder).ok_or(Errno::ENOMEM)?;
        if let Err(abort) = self.machine.zero(frame) {
            log::error!("{frame:?} is free in the books, but not accessible: {abort:?}");
            self.frames.note(frame, Holder::Lost);
            return Err(Errno::EIO);
        }
        Ok(frame)
    }

    /// Gives a frame of the host's back.
    pub fn give_back(&mut self, frame: Pfn) {
        if let Err(error) = self.frames.give_back(frame) {
            log::error!("not freed: {error:?}");
        }
    }

    /// Makes a call that needs no pages; the hypervisor's refusal becomes an error.
    pub fn call(&self, call: HostCall) -> Result<HostResult, Errno> {
        let result = self.machine.call(call).ok_or(Errno::EIO)?;
        result.outcome?;
        Ok(result)
    }

    /// Makes a call and, as long as it lacks pages, gives them and repeats it. Pages for a VM's tables
    /// are noted by `given`.
    pub fn call_supplied(
        &mut self,
        call: HostCall,
        given: &mut dyn FnMut(Pfn, u64),
        vm: Option<abi::VmHandle>,
    ) -> Result<HostResult, Errno> {
        for _ in 0..SUPPLY_LIMIT {
            let result = self.machine.call(call).ok_or(Errno::EIO)?;
            match result.outcome {
                Ok(()) => return Ok(result),
                Err(abi::Error::NoMemory) => {
                    let [pages, pool, ..] = result.values;
                    self.supply(Pool::from_word(pool).ok_or(Errno::EIO)?, pages, given, vm)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        log::error!("{call:?} asks for pages without end");
        Err(Errno::ENOMEM)
    }

    /// Gives `pages` adjacent pages, aligned to their number, to a pool.
    pub fn supply(
        &mut self,
        pool: Pool,
        pages: u64,
        given: &mut dyn FnMut(Pfn, u64),
        vm: Option<abi::VmHandle>,
    ) -> Result<(), Errno> {
        let holder = match (pool, vm) {
            (Pool::Vm, Some(vm)) => Holder::VmPool(vm),
            (Pool::Vm, None) => return Err(Errno::EIO),
            (Pool::Tables | Pool::Metadata, _) => Holder::HypPool,
        };
        let pages = pages.max(1);
        let first = self
            .frames
            .take_aligned(pages, pages.next_power_of_two(), Holder::Kernel)
            .ok_or(Errno::ENOMEM)?;
        let mut done = 0;
        let outcome = loop {
            let (pfn, left) = (first.plus(done), pages.saturating_sub(done));
            if left == 0 {
                break Ok(());
            }
            let call = match holder {
                Holder::VmPool(vm) => HostCall::VmTopUp { vm, pfn: pfn.0, pages: left },
                _ => HostCall::PoolTopUp { pool, pfn: pfn.0, pages: left },
            };
            let Some(result) = self.machine.call(call) else { break Err(Errno::EIO) };
            match (result.outcome, result.values) {
                (Ok(()), [0, ..]) => break Err(Errno::EIO),
                (Ok(()), [count, ..]) => done = done.saturating_add(count.min(left)),
                // What is given here may need tables first; a gift of tables never does.
                (Err(abi::Error::NoMemory), [tables, ..]) if pool != Pool::Tables => {
                    if let Err(error) = self.supply(Pool::Tables, tables, &mut |_, _| {}, None) {
                        break Err(error);
                    }
                }
                (Err(error), _) => break Err(error.into()),
            }
        };
        for page in 0..done {
            self.frames.note(first.plus(page), holder);
        }
        if holder != Holder::HypPool && done > 0 {
            given(first, done);
        }
        for page in done..pages {
            self.give_back(first.plus(page));
        }
        outcome
    }
}
