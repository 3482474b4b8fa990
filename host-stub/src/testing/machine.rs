//! RAM as an array, and a fake EL2 that keeps page states. It logs what it was asked, among what the TLB was told, so that
//! tests can check orders.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::cell::RefCell;
use core::ops::Range;

use abi::host::{CALL_WORDS, HostResult, RESULT_WORDS};
use abi::page::Pool;
use abi::{Exit, HostCall, HostState, VmHandle};

use crate::host::Host;
use crate::machine::{Abort, Hidden, Hypervisor, Machine, Memory, OddCall, Timed, Undefined};
use crate::mm::{Frames, Holder, PAGE, Pfn};
use crate::process::context::{FpState, UserContext};
use crate::secondary::Secondary;

/// What EL2 and the TLB saw, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A page's translation was dropped.
    Flush(u64),
    /// All translations of an address space were.
    FlushSpace,
    /// A page was donated.
    Donate { pfn: u64, gfn: u64 },
    /// A page was lent.
    Share { pfn: u64, gfn: u64 },
    /// A lent page was taken back.
    Unshare { gfn: u64 },
    /// An unshare was acknowledged.
    Ack,
    /// The boot entry was set.
    Boot { pc: u64, x0: u64 },
    /// A vCPU ran with this first value.
    Run(u64),
    /// Interrupts were taken.
    Interrupts,
    /// A CPU was interrupted.
    Kick(usize),
}

#[derive(Default)]
struct State {
    memory: Vec<u8>,
    absent: bool,
    states: BTreeMap<u64, HostState>,
    queries: BTreeMap<u64, usize>,
    flushed: Vec<(u16, u64)>,
    events: Vec<Event>,
    exits: VecDeque<Exit>,
    pool_pages: Vec<u64>,
    guest: BTreeMap<u64, u64>,
    lack_at_create: u64,
    lack_at_donate: u64,
    lack_at_ack: u64,
    refuse_reclaim: bool,
    refuse_gifts: bool,
    refuse_cpus: bool,
    console: Vec<u8>,
    now: u64,
}

/// The machine.
pub(crate) struct FakeMachine {
    pages: u64,
    secondaries: [Secondary; 1],
    state: RefCell<State>,
}

impl FakeMachine {
    /// Where RAM begins.
    pub(crate) const BASE: u64 = 0x4000_0000;

    pub(crate) fn new(pages: u64) -> Self {
        let memory = alloc::vec![0x5a; (pages * PAGE) as usize];
        Self {
            pages,
            secondaries: [Secondary::new()],
            state: RefCell::new(State { memory, ..State::default() }),
        }
    }

    pub(crate) fn frames(&self) -> Frames {
        let records = alloc::vec![Holder::Free; self.pages as usize].leak();
        let first = Pfn::containing(Self::BASE);
        let mut frames = Frames::new(first, records);
        frames.release(first, first.plus(self.pages));
        frames
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host::new(self, self.frames())
    }

    pub(crate) fn set_state(&self, frame: Pfn, state: HostState) {
        self.state.borrow_mut().states.insert(frame.0, state);
    }

    pub(crate) fn host_state(&self, frame: Pfn) -> HostState {
        self.state.borrow().states.get(&frame.0).copied().unwrap_or(HostState::Owned)
    }

    /// How often EL2 was asked about a page.
    pub(crate) fn queries(&self, frame: Pfn) -> usize {
        self.state.borrow().queries.get(&frame.0).copied().unwrap_or(0)
    }

    pub(crate) fn remove_hypervisor(&self) {
        self.state.borrow_mut().absent = true;
    }

    pub(crate) fn lack_at_create(&self, pages: u64) {
        self.state.borrow_mut().lack_at_create = pages;
    }

    pub(crate) fn lack_at_donate(&self, pages: u64) {
        self.state.borrow_mut().lack_at_donate = pages;
    }

    pub(crate) fn lack_at_ack(&self, pages: u64) {
        self.state.borrow_mut().lack_at_ack = pages;
    }

    pub(crate) fn refuse_reclaim(&self) {
        self.state.borrow_mut().refuse_reclaim = true;
    }

    /// Refuses to give or lend pages to guests, or no more.
    pub(crate) fn refuse_gifts(&self, refuse: bool) {
        self.state.borrow_mut().refuse_gifts = refuse;
    }

    pub(crate) fn refuse_cpus(&self) {
        self.state.borrow_mut().refuse_cpus = true;
    }

    /// What the next runs of a vCPU end with.
    pub(crate) fn exits(&self, exits: &[Exit]) {
        self.state.borrow_mut().exits.extend(exits);
    }

    pub(crate) fn flushed(&self) -> Vec<(u16, u64)> {
        self.state.borrow().flushed.clone()
    }

    /// What happened since the last time.
    pub(crate) fn events(&self) -> Vec<Event> {
        core::mem::take(&mut self.state.borrow_mut().events)
    }

    pub(crate) fn printed(&self) -> Vec<u8> {
        self.state.borrow().console.clone()
    }

    fn offset(&self, address: u64, length: usize) -> Result<Range<usize>, Abort> {
        let abort = Abort { esr: 0x9600_0090, far: address };
        let start = address.checked_sub(Self::BASE).ok_or(abort)? as usize;
        if start + length > (self.pages * PAGE) as usize
            || !self.host_state(Pfn::containing(address)).is_accessible()
        {
            return Err(abort);
        }
        Ok(start..start + length)
    }

    fn serve(&self, call: HostCall) -> HostResult {
        let vm = VmHandle::new(1, 1).unwrap();
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let lack = |missing: &mut u64, pool| {
            let pages = core::mem::take(missing);
            (pages > 0).then(|| HostResult::lacking(pool, pages))
        };
        let host_state =
            |states: &BTreeMap<u64, HostState>, pfn| states.get(&pfn).copied().unwrap_or(HostState::Owned);
        match call {
            HostCall::Version => HostResult::ok(&[1]),
            HostCall::QueryPage { pfn } => {
                *state.queries.entry(pfn).or_default() += 1;
                HostResult::ok(&[host_state(&state.states, pfn) as u64, 1])
            }
            HostCall::PoolTopUp { pfn, pages, .. } => {
                state.states.extend((pfn..pfn + pages).map(|pfn| (pfn, HostState::NoPage)));
                HostResult::ok(&[pages])
            }
            HostCall::VmTopUp { pfn, .. } => {
                // One page a call, so that callers have to loop.
                state.states.insert(pfn, HostState::NoPage);
                state.pool_pages.push(pfn);
                HostResult::ok(&[1])
            }
            HostCall::VmCreate { root, .. } => {
                if let Some(result) = lack(&mut state.lack_at_create, Pool::Metadata) {
                    return result;
                }
                assert_eq!(root % 2, 0, "the root is aligned");
                for pfn in root..root + 2 {
                    state.states.insert(pfn, HostState::NoPage);
                    state.pool_pages.push(pfn);
                }
                HostResult::ok(&[vm.to_word()])
            }
            HostCall::VcpuSetBoot { pc, x0, .. } => {
                state.events.push(Event::Boot { pc, x0 });
                HostResult::ok(&[])
            }
            HostCall::DonateGuest { .. } | HostCall::ShareGuest { .. } if state.refuse_gifts => {
                HostResult::refused(abi::Error::Permission)
            }
            HostCall::DonateGuest { pfn, gfn, .. } => {
                if let Some(result) = lack(&mut state.lack_at_donate, Pool::Vm) {
                    return result;
                }
                if host_state(&state.states, pfn) != HostState::Owned {
                    return HostResult::refused(abi::Error::Permission);
                }
                state.events.push(Event::Donate { pfn, gfn });
                state.states.insert(pfn, HostState::NoPage);
                state.guest.insert(gfn, pfn);
                HostResult::ok(&[1])
            }
            HostCall::ShareGuest { pfn, gfn, .. } => {
                state.events.push(Event::Share { pfn, gfn });
                state.states.insert(pfn, HostState::SharedOwned);
                state.guest.insert(gfn, pfn);
                HostResult::ok(&[1])
            }
            HostCall::UnshareGuest { gfn, .. } => {
                state.events.push(Event::Unshare { gfn });
                let Some(pfn) = state.guest.remove(&gfn) else {
                    return HostResult::refused(abi::Error::NoEntry);
                };
                state.states.insert(pfn, HostState::Owned);
                HostResult::ok(&[1])
            }
            HostCall::UnshareAck { .. } => {
                if let Some(result) = lack(&mut state.lack_at_ack, Pool::Tables) {
                    return result;
                }
                state.events.push(Event::Ack);
                HostResult::ok(&[1])
            }
            HostCall::VcpuRun { values: [value, ..], .. } => {
                state.events.push(Event::Run(value));
                match state.exits.pop_front() {
                    Some(exit) => HostResult::ok(&exit.to_words()),
                    None => HostResult::refused(abi::Error::Again),
                }
            }
            HostCall::ReclaimGuest { gfn, .. } => match state.guest.get(&gfn).copied() {
                _ if state.refuse_reclaim => HostResult::refused(abi::Error::Permission),
                Some(pfn) => {
                    state.guest.remove(&gfn);
                    state.states.insert(pfn, HostState::Owned);
                    HostResult::ok(&[1])
                }
                None => HostResult::refused(abi::Error::NoEntry),
            },
            HostCall::VmTeardownFinish { .. } => {
                for pfn in core::mem::take(&mut state.pool_pages) {
                    state.states.insert(pfn, HostState::Owned);
                }
                HostResult::ok(&[1, 0])
            }
            _ => HostResult::ok(&[]),
        }
    }
}

impl Hypervisor for FakeMachine {
    fn call_words(&self, words: &[u64; CALL_WORDS]) -> [u64; RESULT_WORDS] {
        let mut out = [0; RESULT_WORDS];
        match HostCall::decode(words) {
            Ok(call) if !self.state.borrow().absent => {
                out[1..].copy_from_slice(&self.serve(call).to_words());
            }
            _ => out[0] = abi::smccc::NOT_SUPPORTED,
        }
        out
    }
}

impl Memory for FakeMachine {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Abort> {
        let range = self.offset(address, into.len())?;
        into.copy_from_slice(&self.state.borrow().memory[range]);
        Ok(())
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), Abort> {
        let range = self.offset(address, from.len())?;
        self.state.borrow_mut().memory[range].copy_from_slice(from);
        Ok(())
    }

    fn load(&self, address: u64) -> Result<u64, Abort> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(&self, address: u64, value: u64) -> Result<(), Abort> {
        self.write(address, &value.to_le_bytes())
    }

    fn zero(&self, page: Pfn) -> Result<(), Abort> {
        self.write(page.address(), &[0; PAGE as usize])
    }

    fn make_executable(&self, _: Pfn) {}

    fn publish_tables(&self) {}

    fn flush_page(&self, asid: u16, address: u64) {
        let mut state = self.state.borrow_mut();
        state.flushed.push((asid, address));
        state.events.push(Event::Flush(address));
    }

    fn flush_space(&self, _: u16) {
        self.state.borrow_mut().events.push(Event::FlushSpace);
    }
}

impl Machine for FakeMachine {
    fn now(&self) -> u64 {
        self.state.borrow().now
    }

    fn take_interrupts(&self) {
        self.state.borrow_mut().events.push(Event::Interrupts);
    }

    fn idle(&self) {
        self.state.borrow_mut().now += 10_000_000;
    }

    fn console(&self, bytes: &[u8]) {
        self.state.borrow_mut().console.extend(bytes);
    }

    fn smc(&self, words: [u64; 4]) -> [u64; 4] {
        words
    }

    fn odd_call(&self, _: OddCall, _: &[u64; CALL_WORDS]) -> u64 {
        abi::smccc::NOT_SUPPORTED
    }

    fn hidden(&self, _: Hidden) -> Result<u64, Undefined> {
        Err(Undefined { esr: 1 << 25 })
    }

    fn secondaries(&self) -> &[Secondary] {
        &self.secondaries
    }

    fn turn_on(&self, _: usize) -> u64 {
        if self.state.borrow().refuse_cpus { abi::psci::INVALID_PARAMETERS } else { abi::psci::SUCCESS }
    }

    fn is_off(&self, _: usize) -> bool {
        true
    }

    fn wake(&self) {}

    fn kick(&self, cpu: usize) {
        self.state.borrow_mut().events.push(Event::Kick(cpu));
    }

    fn relax(&self) {
        self.state.borrow_mut().now += 1_000_000_000;
    }

    fn timed(&self, what: Timed, words: &[u64; CALL_WORDS]) -> (u64, [u64; RESULT_WORDS]) {
        let mut results = [0; RESULT_WORDS];
        for (result, word) in results.iter_mut().zip(words) {
            *result = *word;
        }
        (what as u64 + 1, results)
    }

    fn counter_at_entry(&self) -> u64 {
        7
    }

    fn run_user(&self, _: &mut UserContext, _: Pfn, _: u16) {}

    fn save_fp(&self, _: &mut FpState) {}

    fn restore_fp(&self, _: &FpState) {}

    fn random(&self) -> [u8; 16] {
        [7; 16]
    }
}
