//! Looks before, asks the specification, looks after, compares.

use super::abstraction;
use super::report::{Difference, Report, Visit};
use super::window::{ELSEWHERE, GUEST_PAGES, PAGES, Window};
use crate::Hypervisor;
use crate::addr::{Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::ownership::{self, share};
use crate::sync::{Lock, Mutex, MutexGuard};
use crate::vm::Vm;
use crate::watch::{Answer, Asked, Held};
use abi::host::HostResult;
use abi::page::Pool;
use abi::{Error, VmHandle};
use spec::state::{Content, GuestEntry, HostEntry, Page, Use};
use spec::{Call, Outcome, World};

/// What a window shows, as the specification has it. The VM that the call is about has number 0.
type State = spec::State<PAGES, 1, GUEST_PAGES>;

/// What the oracle has cost so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Transitions that were checked.
    pub transitions: u64,
    /// Nanoseconds of the system counter in the transitions themselves.
    pub core: u64,
    /// The same in the oracle.
    pub oracle: u64,
}

/// As words of the verdict line.
impl core::fmt::Display for Cost {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { transitions, core, oracle } = self;
        write!(f, " checked={transitions} core_ns={core} oracle_ns={oracle}")
    }
}

/// The oracle's own state.
#[derive(Debug)]
pub(super) struct View {
    pub(super) window: Window,
    /// What the tables said before the transition.
    pub(super) before: State,
    /// What the specification makes of it.
    pub(super) expected: State,
    /// Whether EL2 mapped each page before.
    mapped: [bool; PAGES],
    /// Pages that the VM counts and that the state leaves out: the window does not show them.
    uncounted: u64,
    /// Pages of the window that can be pinned at a time, given those that are pinned elsewhere.
    pins: usize,
    /// When the transition began.
    began: u64,
    cost: Cost,
}

/// Copied from here, and never made on a stack.
static EMPTY: State = State::new();

const NOTHING: View = View {
    window: Window::new(),
    before: State::new(),
    expected: State::new(),
    mapped: [false; PAGES],
    uncounted: 0,
    pins: 0,
    began: 0,
    cost: Cost { transitions: 0, core: 0, oracle: 0 },
};

static VIEW: Mutex<View> = Mutex::new(Lock::Oracle, NOTHING);

/// What the oracle has cost so far.
pub fn cost() -> Cost {
    VIEW.lock().cost
}

/// A transition that is watched.
#[derive(Debug)]
pub(crate) struct Watch {
    asked: Asked,
    view: MutexGuard<'static, View>,
}

impl Watch {
    /// Looks at what there is before a transition.
    ///
    /// # Panics
    /// If that breaks an invariant already.
    pub(crate) fn begin<M: Machine>(hypervisor: &Hypervisor<M>, asked: Asked, held: Held<'_>) -> Self {
        let mut view = VIEW.lock();
        let began = hypervisor.machine.now();
        let (vm, pfns, gfns) = about(asked);
        view.window.lay(&hypervisor.machine, held, vm, pfns, gfns);
        if let Some(broken) = view.look(hypervisor, asked, held) {
            let report = Report { asked, view: &view, outcomes: None, differences: &|visit| visit(broken) };
            report.stop();
        }
        view.began = hypervisor.machine.now();
        view.cost.oracle += view.began - began;
        Self { asked, view }
    }

    /// Looks at what there is after it, and compares with what the specification says.
    ///
    /// # Panics
    /// If they differ.
    pub(crate) fn end<M: Machine>(mut self, hypervisor: &Hypervisor<M>, held: Held<'_>, answer: Answer) {
        let ended = hypervisor.machine.now();
        let asked = self.asked;
        let view = &mut *self.view;
        let real = outcome(asked, &view.window, answer);
        let lack = match real {
            Outcome::Lacking(pool) => Some(pool),
            _ => None,
        };
        let expected = view.consult(hypervisor, asked, held, lack);
        let view = &*view;
        let differences =
            |visit: &mut Visit<'_>| view.compare(hypervisor, asked, held, expected, real, visit);
        let mut is_same = true;
        differences(&mut |_| is_same = false);
        if !is_same {
            let report = Report { asked, view, outcomes: Some((expected, real)), differences: &differences };
            report.stop();
        }
        let began = self.view.began;
        let cost = &mut self.view.cost;
        cost.core += ended - began;
        cost.transitions += 1;
        cost.oracle += hypervisor.machine.now() - ended;
    }
}

impl View {
    /// Reads the tables into `before`. Returns what is broken there.
    fn look<M: Machine>(
        &mut self,
        hypervisor: &Hypervisor<M>,
        asked: Asked,
        held: Held<'_>,
    ) -> Option<Difference> {
        let machine = &hypervisor.machine;
        self.before = EMPTY;
        for number in 0..self.window.len {
            let Some(pfn) = self.window.pfn(number) else { continue };
            let page = abstraction::page(hypervisor, held, &self.window, pfn);
            self.before.pages[number] = page;
            self.mapped[number] = held.hyp.is_some_and(|hyp| abstraction::is_mapped(machine, hyp, pfn));
            let is_memory = hypervisor.memory.contains(pfn);
            if held.hyp.is_some() && is_memory && self.mapped[number] != page.mapped_at_el2() {
                return Some(Difference::Mapped { pfn, expected: page.mapped_at_el2() });
            }
        }
        let shown = self.before.pages.iter().filter(|page| page.pins > 0).count();
        self.pins = held.hyp.map_or(0, |hyp| share::MAX_PINNED - hyp.pins.len() + shown);
        let vm = &mut self.before.vms[0];
        vm.phase = abstraction::phase(held.vm);
        if let Some(real) = held.vm {
            vm.protected = real.flags.protected;
            // Whoever had to be asked before an unshare has been, but where the call is about just that.
            vm.immediate = !matches!(asked, Asked::MayUnshare(..));
            let mut shown = 0;
            for number in 0..self.window.gfns {
                let gfn = self.window.guest_page(number);
                let Some(entry) = abstraction::guest_entry(machine, real, &self.window, gfn) else {
                    return Some(Difference::OddGuestEntry { gfn: self.window.gfn + number as u64 });
                };
                if let GuestEntry::Page { pfn, sharing } = entry {
                    shown += 1;
                    if held.host.is_none() {
                        // Nobody can tell: the host's side is taken to agree.
                        self.before.pages[usize::from(pfn)].host = abstraction::agreeing(sharing, number);
                    }
                }
                vm.entries[number] = entry;
            }
            // Whether there are others is all that the rules ask for.
            let counted = real.space.pages.min(shown + 1);
            vm.pages = counted as u16;
            self.uncounted = real.space.pages - counted;
        }
        if let Asked::GiveBack(_, pages) = asked {
            // Whose pages they are, the tables do not say.
            for pfn in pages.iter() {
                let page = &mut self.before.pages[self.window.index_of(pfn.as_u64())];
                if page.host == HostEntry::Hyp(Use::Pool) {
                    page.host = HostEntry::Hyp(Use::Vm(0));
                }
            }
        }
        // Both sides of what a guest has are known only with both locks.
        let shows_both = held.host.is_some() && self.window.len < ELSEWHERE;
        let broken = if shows_both { spec::invariants::broken_in_window(&self.before) } else { None };
        broken.map(Difference::Invariant)
    }

    /// Asks the specification what becomes of the call; `expected` is the state after it.
    fn consult<M: Machine>(
        &mut self,
        hypervisor: &Hypervisor<M>,
        asked: Asked,
        held: Held<'_>,
        lack: Option<Pool>,
    ) -> Outcome {
        self.expected = self.before;
        if let Some(outcome) = beyond_the_rules(asked, held.vm) {
            return outcome;
        }
        let world = self.world(hypervisor, asked, held);
        let call = call(asked, &self.window);
        match spec::step_in_place(&world, &mut self.expected, call, lack) {
            Ok(outcome) => outcome,
            Err(refusal) => {
                // A refused call changes nothing (I5).
                self.expected = self.before;
                refusal
            }
        }
    }

    /// Where the window lies, and what is around it.
    fn world<M: Machine>(&self, hypervisor: &Hypervisor<M>, asked: Asked, held: Held<'_>) -> World {
        let (_, pfns, _) = about(asked);
        let mut regions = hypervisor.memory.regions().iter();
        let region = pfns.and_then(|pages| regions.find(|region| region.contains(pages.start())));
        let pages = region.map_or(0, |region| region.end() - self.window.first_pfn());
        let gfns = held.vm.map_or(0, |vm| vm.space.table.input_end().saturating_sub(self.window.gfn));
        World { pfn: self.window.first_pfn(), pages, gfn: self.window.gfn, gfns, pins: self.pins }
    }

    /// The page of this number in the window: before, and as it is expected to be.
    pub(super) fn page(&self, number: usize) -> (Page, Page) {
        (self.before.pages[number], self.expected.pages[number])
    }

    /// Shows every difference between what the specification says and what is there.
    fn compare<M: Machine>(
        &self,
        hypervisor: &Hypervisor<M>,
        asked: Asked,
        held: Held<'_>,
        expected: Outcome,
        real: Outcome,
        visit: &mut Visit<'_>,
    ) {
        if expected != real {
            visit(Difference::Outcome);
        }
        if held.host.is_some() {
            for number in 0..self.window.len {
                self.compare_page(hypervisor, held, number, visit);
            }
        }
        if let Some(vm) = held.vm {
            for number in 0..self.window.gfns {
                let gfn = self.window.guest_page(number);
                let real = abstraction::guest_entry(&hypervisor.machine, vm, &self.window, gfn);
                if real != Some(self.expected.vms[0].entries[number]) {
                    visit(Difference::Guest { number, real });
                }
            }
            // At the end of a VM the rules are done in one step, the core page by page.
            let ends = matches!(asked, Asked::TeardownFinish(_) | Asked::GiveBack(..));
            let (is, expected) = (abstraction::phase(Some(vm)), self.expected.vms[0].phase);
            if !ends && is != expected {
                visit(Difference::Phase { expected, real: is });
            }
            let counted = u64::from(self.expected.vms[0].pages) + self.uncounted;
            if vm.space.pages != counted {
                visit(Difference::Count { expected: counted, real: vm.space.pages });
            }
        }
    }

    fn compare_page<M: Machine>(
        &self,
        hypervisor: &Hypervisor<M>,
        held: Held<'_>,
        number: usize,
        visit: &mut Visit<'_>,
    ) {
        let Some(pfn) = self.window.pfn(number) else { return };
        let machine = &hypervisor.machine;
        let real = abstraction::page(hypervisor, held, &self.window, pfn);
        let (before, expected) = self.page(number);
        if (real.host, real.pins) != (plain(expected.host), expected.pins) {
            visit(Difference::Page { number, real });
        }
        if let Some(hyp) = held.hyp {
            let is_unchanged = (before.host, before.pins) == (expected.host, expected.pins);
            let mapped = if is_unchanged { self.mapped[number] } else { expected.mapped_at_el2() };
            if abstraction::is_mapped(machine, hyp, pfn) != mapped {
                visit(Difference::Mapped { pfn, expected: mapped });
            }
        }
        // No page begins as zeros here, so this one has just been wiped. Another CPU of the host's could have written to
        // it since.
        if expected.content == Content::Zeros && machine.is_alone() && !machine.is_zeros(pfn) {
            visit(Difference::NotZeros { pfn });
        }
    }
}

/// The tables do not say what the hypervisor uses a page for.
fn plain(entry: HostEntry) -> HostEntry {
    if entry == HostEntry::Hyp(Use::Vm(0)) { HostEntry::Hyp(Use::Pool) } else { entry }
}

/// What a call comes to for a reason that the rules know nothing of.
fn beyond_the_rules(asked: Asked, vm: Option<&Vm>) -> Option<Outcome> {
    let vm = vm?;
    match asked {
        // The rules have no vCPU that runs.
        Asked::TeardownStart(_) if vm.check_live().is_ok() && vm.is_claimed() => {
            Some(Outcome::Refused(Error::Busy))
        }
        // Nor an end that takes several calls.
        Asked::VmTopUp(..) if !vm.is_growable() => Some(Outcome::Refused(Error::Permission)),
        _ => None,
    }
}

/// The VM, the pages and the guest pages that a call is about.
fn about(asked: Asked) -> (Option<VmHandle>, Option<Pages<Pfn>>, Option<Pages<Gfn>>) {
    match asked {
        Asked::PoolTopUp(_, pages)
        | Asked::ShareHyp(pages)
        | Asked::UnshareHyp(pages)
        | Asked::TakeRoot(_, pages) => (None, Some(pages), None),
        Asked::Pin(page) | Asked::Unpin(page) | Asked::QueryPage(page) => {
            (None, Some(Pages::one(page)), None)
        }
        Asked::VmTopUp(vm, pages) | Asked::GiveBack(vm, pages) => (Some(vm), Some(pages), None),
        Asked::DonateGuest(vm, pfns, gfns) | Asked::ShareGuest(vm, pfns, gfns, _) => {
            (Some(vm), Some(pfns), Some(gfns))
        }
        Asked::UnshareGuest(vm, gfns)
        | Asked::ReclaimGuest(vm, gfns)
        | Asked::Share(vm, gfns)
        | Asked::Unshare(vm, gfns)
        | Asked::MayUnshare(vm, gfns)
        | Asked::Relinquish(vm, gfns)
        | Asked::GuardMap(vm, gfns)
        | Asked::GuardUnmap(vm, gfns) => (Some(vm), None, Some(gfns)),
        Asked::ForceReclaim(pfns, None) => (None, Some(pfns), None),
        Asked::ForceReclaim(pfns, Some((vm, gfns))) => (Some(vm), Some(pfns), Some(gfns)),
        Asked::TeardownStart(vm) | Asked::TeardownFinish(vm) => (Some(vm), None, None),
    }
}

/// The call in the specification's words, with the numbers of the window.
pub(super) fn call(asked: Asked, window: &Window) -> Call {
    let vm = 0;
    let pfn = |page: Pfn| window.pages(Pages::one(page)).first;
    match asked {
        Asked::PoolTopUp(pool, pages) => Call::PoolTopUp { pool, pfns: window.pages(pages) },
        Asked::VmTopUp(_, pages) => Call::VmTopUp { vm, pfns: window.pages(pages) },
        Asked::ShareHyp(pages) => Call::ShareHyp { pfns: window.pages(pages) },
        Asked::UnshareHyp(pages) => Call::UnshareHyp { pfns: window.pages(pages) },
        Asked::Pin(page) => Call::Pin { pfn: pfn(page) },
        Asked::Unpin(page) => Call::Unpin { pfn: pfn(page) },
        Asked::QueryPage(page) => Call::QueryPage { pfn: pfn(page) },
        Asked::DonateGuest(_, pfns, gfns) => {
            let (pfns, gfns) = (window.pages(pfns), window.guest_pages(gfns));
            Call::DonateGuest { vm, pfn: pfns.first, gfn: gfns.first, count: pfns.count }
        }
        Asked::ShareGuest(_, pfns, gfns, permissions) => {
            let (pfns, gfns) = (window.pages(pfns), window.guest_pages(gfns));
            Call::ShareGuest { vm, pfn: pfns.first, gfn: gfns.first, count: pfns.count, permissions }
        }
        Asked::UnshareGuest(_, gfns) => Call::UnshareGuest { vm, gfns: window.guest_pages(gfns) },
        Asked::ReclaimGuest(_, gfns) => Call::ReclaimGuest { vm, gfns: window.guest_pages(gfns) },
        Asked::ForceReclaim(pfns, _) => Call::ForceReclaim { pfns: window.pages(pfns) },
        Asked::Share(_, gfns) => Call::Share { vm, gfns: window.guest_pages(gfns) },
        Asked::Unshare(_, gfns) | Asked::MayUnshare(_, gfns) => {
            Call::Unshare { vm, vcpu: 0, gfns: window.guest_pages(gfns) }
        }
        Asked::Relinquish(_, gfns) => Call::Relinquish { vm, gfns: window.guest_pages(gfns) },
        Asked::GuardMap(_, gfns) => Call::GuardMap { vm, gfns: window.guest_pages(gfns) },
        Asked::GuardUnmap(_, gfns) => Call::GuardUnmap { vm, gfns: window.guest_pages(gfns) },
        Asked::TakeRoot(flags, root) => Call::VmCreate {
            protected: flags.protected,
            immediate: flags.unshare_immediate,
            root: window.pages(root).first,
        },
        Asked::TeardownStart(_) => Call::VmTeardownStart { vm },
        Asked::TeardownFinish(_) | Asked::GiveBack(..) => Call::VmTeardownFinish { vm },
    }
}

/// What the core answered, in the specification's words.
fn outcome(asked: Asked, window: &Window, answer: Answer) -> Outcome {
    match (asked, answer) {
        (Asked::TakeRoot(..), Answer::Done(_)) => Outcome::Created(0),
        (Asked::TeardownFinish(_) | Asked::GiveBack(..), Answer::Done(pages)) => Outcome::Ended(pages),
        (_, Answer::Done(pages)) => Outcome::Done(pages),
        (_, Answer::Asks(pages)) => Outcome::Asked(pages),
        (_, Answer::NotShared) => Outcome::InvalidParameter,
        (_, Answer::Denied(error)) => Outcome::Refused(error),
        (_, Answer::Page(state, is_memory)) => Outcome::Page(state, is_memory),
        (_, Answer::Refused(ownership::Error::Lacking(lacking))) => Outcome::Lacking(lacking.pool),
        (Asked::Share(..), Answer::Refused(ownership::Error::Missing(gfn))) => {
            Outcome::Missing(gfn.as_u64() - window.gfn)
        }
        (
            Asked::Share(..)
            | Asked::Unshare(..)
            | Asked::Relinquish(..)
            | Asked::GuardMap(..)
            | Asked::GuardUnmap(..),
            Answer::Refused(error),
        ) => match error {
            ownership::Error::NoVm | ownership::Error::WrongVm => Outcome::NotServed,
            _ => Outcome::InvalidParameter,
        },
        (_, Answer::Refused(error)) => match HostResult::from(error).outcome {
            Err(error) => Outcome::Refused(error),
            Ok(()) => Outcome::Done(0),
        },
    }
}
