//! The research device: a program that acts as the host's kernel, or makes it misbehave.

use alloc::vec::Vec;
use core::cell::Cell;

use abi::host::{CALL_WORDS, EventKind, HostResult, RESULT_WORDS};
use abi::page::Pool;
use abi::{Error, HostCall, HostState};

use crate::census::Census;
use crate::events::Event;
use crate::series::Series;
use crate::steps::Steps;
use crate::sys::File;
use crate::uapi::deed;
use crate::{Failure, failure};

/// First page of RAM.
const RAM_PFN: u64 = 0x4_0000;

/// `/dev/deed`.
#[derive(Debug)]
pub struct Deed {
    file: File,
    /// Pages that this program itself has given to the hypervisor's pools: the kernel does not know of them.
    given: Cell<u64>,
}

/// What became of a load or store by the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// It was done; the value that a load read.
    Done(u64),
    /// It took an abort.
    Abort {
        /// ESR_EL1.
        syndrome: u64,
        /// FAR_EL1.
        address: u64,
    },
}

impl Touch {
    /// Whether it is the abort that Deed injects: a synchronous external data abort at the same level
    /// (EC 0x25, DFSC 0x10) with the mark S1PTW, a valid FAR and the right offset in the page.
    pub fn is_injected_abort(&self, at: u64) -> bool {
        const FNV: u64 = 1 << 10;
        const S1PTW: u64 = 1 << 7;
        match *self {
            Self::Done(_) => false,
            Self::Abort { syndrome, address } => {
                syndrome >> 26 & 0x3f == 0x25
                    && syndrome & 0x3f == 0x10
                    && syndrome & S1PTW != 0
                    && syndrome & FNV == 0
                    && address & 0xfff == at & 0xfff
            }
        }
    }
}

impl core::fmt::Display for Touch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Done(value) => write!(f, "done, value {value:#x}"),
            Self::Abort { syndrome, address } => write!(f, "abort ESR {syndrome:#x} FAR {address:#x}"),
        }
    }
}

/// What a host call came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Served or refused, with the values of x2 to x9.
    Served(HostResult),
    /// `NOT_SUPPORTED`.
    NotSupported,
    /// Neither: x0 and x1.
    Strange(u64, u64),
}

impl Answer {
    /// The result, if it is a success.
    pub fn ok(self) -> Option<HostResult> {
        match self {
            Self::Served(result) if result.outcome.is_ok() => Some(result),
            _ => None,
        }
    }

    /// Whether the call was refused with this error.
    pub fn is_error(self, error: Error) -> bool {
        matches!(self, Self::Served(result) if result.outcome == Err(error))
    }
}

impl core::fmt::Display for Answer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Served(result) => match result.outcome {
                Ok(()) => f.write_str("success"),
                Err(error) => write!(f, "{error:?}"),
            },
            Self::NotSupported => f.write_str("NOT_SUPPORTED"),
            Self::Strange(x0, x1) => write!(f, "x0 {x0:#x} x1 {x1:#x}"),
        }
    }
}

pub(crate) fn read_answer(results: &[u64; RESULT_WORDS]) -> Answer {
    let [x0, x1, ..] = *results;
    match HostResult::from_words(results) {
        Some(result) => Answer::Served(result),
        None if x0 == abi::smccc::NOT_SUPPORTED => Answer::NotSupported,
        None => Answer::Strange(x0, x1),
    }
}

/// The kernel's own counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Free pages.
    pub free: u64,
    /// Pages in use by the kernel and its programs.
    pub used: u64,
    /// Pages given to the hypervisor's pools.
    pub given_to_pools: u64,
    /// Pages given to VMs.
    pub given_to_vms: u64,
    /// Injected aborts taken.
    pub aborts: u64,
    /// Unshare requests served.
    pub unshares: u64,
}

/// What `TEST_PAGE` says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// Host's state, owner, VM, frame number in the VM, hypervisor's state.
    pub words: [u64; 5],
}

impl core::fmt::Display for PageState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [host, owner, vm, gfn, hyp] = self.words;
        write!(f, "host {host} owner {owner} vm {vm:#x} gfn {gfn:#x} hyp {hyp}")
    }
}

impl Deed {
    /// Opens it.
    pub fn open() -> Result<Self, Failure> {
        Ok(Self { file: File::open("/dev/deed")?, given: Cell::new(0) })
    }

    /// HVC #0 with these registers; returns x0 to x9.
    pub fn call_words(&self, words: [u64; CALL_WORDS]) -> Result<[u64; RESULT_WORDS], Failure> {
        let mut argument = [0u64; 18];
        for (slot, word) in argument.iter_mut().zip(words) {
            *slot = word;
        }
        self.file.request_with("DEED_CALL", deed::CALL, &mut argument)?;
        let mut results = [0; RESULT_WORDS];
        for (result, word) in results.iter_mut().zip(argument) {
            *result = word;
        }
        Ok(results)
    }

    /// A call with these registers, its answer read.
    pub fn answer(&self, words: [u64; CALL_WORDS]) -> Result<Answer, Failure> {
        Ok(read_answer(&self.call_words(words)?))
    }

    /// Makes all calls, loads and stores of a series.
    pub fn series(&self, series: &mut Series) -> Result<(), Failure> {
        let mut argument = series.argument();
        self.file.request_with("DEED_SERIES", deed::SERIES, &mut argument).map(drop)
    }

    /// A request of the device.
    pub(crate) fn request<const N: usize>(
        &self,
        what: &'static str,
        request: u32,
        argument: &mut [u64; N],
    ) -> Result<(), Failure> {
        self.file.request_with(what, request, argument).map(drop)
    }

    /// A call.
    pub fn call(&self, call: HostCall) -> Result<Answer, Failure> {
        self.answer(call.encode())
    }

    /// A call that must succeed; returns x2 to x9.
    pub fn must(&self, call: HostCall) -> Result<[u64; RESULT_WORDS - 2], Failure> {
        let answer = self.call(call)?;
        answer.ok().map(|result| result.values).ok_or_else(|| failure!("{call:?}: {answer}"))
    }

    /// Gives pages to one of the hypervisor's pools, for good.
    pub fn top_up(&self, pool: Pool, pfn: u64, pages: u64) -> Result<(), Failure> {
        self.given.set(self.given.get() + pages);
        self.must(HostCall::PoolTopUp { pool, pfn, pages }).map(drop)
    }

    /// A call that may lack pages: gives them from the kernel's memory, and the call again. Pages that went
    /// to a VM's tables are added to `lent`: they come back when the VM ends.
    pub fn with_top_up(&self, call: HostCall, lent: &mut Vec<(u64, u64)>) -> Result<HostResult, Failure> {
        for _ in 0..16 {
            let answer = self.call(call)?;
            let Answer::Served(result) = answer else { return Err(failure!("{call:?}: {answer}")) };
            let [pages, pool, ..] = result.values;
            if result.outcome != Err(Error::NoMemory) {
                return Ok(result);
            }
            let pool = Pool::from_word(pool).ok_or_else(|| failure!("there is no pool {pool}"))?;
            let pfn = self.alloc(pages)?;
            match (pool, call) {
                (Pool::Vm, HostCall::DonateGuest { vm, .. } | HostCall::ShareGuest { vm, .. }) => {
                    lent.push((pfn, pages));
                    self.must(HostCall::VmTopUp { vm, pfn, pages })?;
                }
                _ => self.top_up(pool, pfn, pages)?,
            }
        }
        Err(failure!("{call:?} lacks pages for ever"))
    }

    /// Plays a list of calls: its address, its entries, and rounds. See [`crate::play`].
    pub fn play(&self, mut argument: [u64; 3]) -> Result<(), Failure> {
        self.file.request_with("DEED_PLAY", deed::PLAY, &mut argument).map(drop)
    }

    /// What the virtual counter read at the kernel's first instruction.
    pub fn counter_at_entry(&self) -> Result<u64, Failure> {
        let mut count = [0];
        self.file.request_with("DEED_COUNTER_AT_ENTRY", deed::COUNTER_AT_ENTRY, &mut count)?;
        Ok(count[0])
    }

    /// A register of a hidden feature as the kernel reads it, by its number in `host_stub::machine::Hidden`: its value,
    /// or the ESR of the UNDEFINED exception.
    pub fn hidden(&self, which: u64) -> Result<Result<u64, u64>, Failure> {
        let mut argument = [which, 0, 0, 0];
        self.file.request_with("DEED_HIDDEN", deed::HIDDEN, &mut argument)?;
        let [_, value, undefined, esr] = argument;
        Ok(if undefined == 0 { Ok(value) } else { Err(esr) })
    }

    /// The state of a page as the hypervisor answers the gate's question.
    pub fn query(&self, pfn: u64) -> Result<Option<HostState>, Failure> {
        Ok(self.call(HostCall::QueryPage { pfn })?.ok().and_then(|result| result.host_state()))
    }

    /// Whether the host may access a page; `false` too for what is no page.
    pub fn accessible(&self, pfn: u64) -> Result<bool, Failure> {
        Ok(self.query(pfn)?.is_some_and(HostState::is_accessible))
    }

    /// The kernel loads 8 bytes.
    pub fn load(&self, address: u64) -> Result<Touch, Failure> {
        self.touch(address, false, 0)
    }

    /// The kernel stores 8 bytes.
    pub fn store(&self, address: u64, value: u64) -> Result<Touch, Failure> {
        self.touch(address, true, value)
    }

    fn touch(&self, address: u64, write: bool, value: u64) -> Result<Touch, Failure> {
        let mut argument = [address, u64::from(write), value, 0, 0, 0];
        self.file.request_with("DEED_TOUCH", deed::TOUCH, &mut argument)?;
        let [_, _, value, aborted, syndrome, far] = argument;
        Ok(if aborted == 0 { Touch::Done(value) } else { Touch::Abort { syndrome, address: far } })
    }

    /// The page behind an offset of a guest_memfd; `None` if there is none yet.
    pub fn gmem_pfn(&self, memory: &File, offset: u64) -> Result<Option<u64>, Failure> {
        let mut argument = [memory.raw(), offset, 0];
        match self.file.request_with("DEED_GMEM_PFN", deed::GMEM_PFN, &mut argument) {
            Ok(_) => Ok(Some(argument[2])),
            Err(Failure::System { errno: crate::uapi::errno::ENOENT, .. }) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Sets how the kernel misbehaves.
    pub fn misbehave(&self, bits: u64) -> Result<(), Failure> {
        self.file.request_with("DEED_MISBEHAVE", deed::MISBEHAVE, &mut [bits]).map(drop)
    }

    /// Takes contiguous pages from the kernel.
    pub fn alloc(&self, pages: u64) -> Result<u64, Failure> {
        let mut argument = [0, pages];
        self.file.request_with("DEED_ALLOC", deed::ALLOC, &mut argument)?;
        Ok(argument[0])
    }

    /// Gives them back.
    pub fn free(&self, pfn: u64, pages: u64) -> Result<(), Failure> {
        self.file.request_with("DEED_FREE", deed::FREE, &mut [pfn, pages]).map(drop)
    }

    /// The kernel's own counts.
    pub fn stats(&self) -> Result<Stats, Failure> {
        let mut argument = [0; 6];
        self.file.request_with("DEED_STATS", deed::STATS, &mut argument)?;
        let [free, used, given_to_pools, given_to_vms, aborts, unshares] = argument;
        Ok(Stats { free, used, given_to_pools, given_to_vms, aborts, unshares })
    }

    /// Deed's handle of a VM.
    pub fn vm_handle(&self, vm: &crate::kvm::Vm) -> Result<abi::VmHandle, Failure> {
        let mut argument = [vm.file().raw(), 0];
        self.file.request_with("DEED_VM_HANDLE", deed::VM_HANDLE, &mut argument)?;
        let [_, word] = argument;
        abi::VmHandle::from_word(word).ok_or_else(|| failure!("{word:#x} is no handle"))
    }

    /// SMC #0 by the kernel; returns x0 to x3.
    pub fn smc(&self, mut words: [u64; 4]) -> Result<[u64; 4], Failure> {
        self.file.request_with("DEED_SMC", deed::SMC, &mut words)?;
        Ok(words)
    }

    /// Ends the report, and the machine by a power call of the kernel's. Returns only if that does.
    pub fn end_machine(&self, steps: &mut Steps, function: u32) -> Failure {
        steps.finish();
        match self.smc([function.into(), 0, 0, 0]) {
            Ok([x0, ..]) => failure!("the power call returned {x0:#x}"),
            Err(failure) => failure,
        }
    }

    /// HVC #1 (1) or SMC #1 (2) by the kernel with this function id; returns x0.
    pub fn odd_immediate(&self, choice: u64, function: u64) -> Result<u64, Failure> {
        let mut argument = [choice, function, 0, 0, 0, 0, 0, 0];
        self.file.request_with("DEED_HVC_IMM", deed::HVC_IMM, &mut argument)?;
        Ok(argument[0])
    }

    /// Counts of pages; `None` in a build without test calls.
    pub fn census(&self) -> Result<Option<Census>, Failure> {
        let given = self.stats()?.given_to_pools + self.given.get();
        Ok(self.call(HostCall::TestCensus)?.ok().map(|result| {
            let [host, hyp, guest, tables_used, tables_free, metadata, ..] = result.values;
            Census { host, hyp, guest, tables_used, tables_free, metadata, given }
        }))
    }

    /// The state of a page; `None` in a build without test calls.
    pub fn page_state(&self, pfn: u64) -> Result<Option<PageState>, Failure> {
        Ok(self.call(HostCall::TestPage { pfn })?.ok().map(|result| {
            let [a, b, c, d, e, ..] = result.values;
            PageState { words: [a, b, c, d, e] }
        }))
    }

    /// Aborts that the hypervisor has injected; `None` in a build without test calls.
    pub fn injected_aborts(&self) -> Result<Option<u64>, Failure> {
        Ok(self.call(HostCall::TestCounters)?.ok().map(|result| result.values[0]))
    }

    /// Page-table events from a number on, as many as are kept; none in a build without test calls.
    pub fn events(&self, mut from: u64) -> Result<Vec<Event>, Failure> {
        let mut events = Vec::new();
        while let Some(result) = self.call(HostCall::TestEvents { from })?.ok() {
            let [number, kind, vmid, address, old, new, ..] = result.values;
            let Some(kind) = EventKind::from_word(kind) else { break };
            events.push(Event { number, kind, vmid, address, old, new });
            from = number + 1;
        }
        Ok(events)
    }

    /// A page of the hypervisor's, found by asking for pages of the first 256 MiB of RAM: one that the host may not access,
    /// while no VM of the host's has got any.
    ///
    /// # Errors
    /// If there is none.
    pub fn find_hypervisor_page(&self) -> Result<u64, Failure> {
        for pfn in (RAM_PFN..RAM_PFN + (256 << 8)).step_by(16) {
            if self.query(pfn)? == Some(HostState::NoPage) {
                return Ok(pfn);
            }
        }
        Err(failure!("no page of the hypervisor's found"))
    }
}
