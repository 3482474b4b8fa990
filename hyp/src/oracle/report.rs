//! Tells a difference in calls and pages, and stops the machine.

use super::abstraction::ODD;
use super::check::{View, call};
use super::window::{ELSEWHERE, Window};
use crate::addr::{Frame, Pages, Pfn};
use crate::watch::Asked;
use abi::VmHandle;
use core::fmt;
use spec::Outcome;
use spec::call::{CALLS, OUTCOMES};
use spec::state::{GuestEntry, HostEntry, Page, Phase, Sharing};

/// Differences that are told one by one.
const TOLD: usize = 12;

/// Something that is not as the specification has it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Difference {
    /// What the call returns.
    Outcome,
    /// A page, by its number in the window.
    Page { number: usize, real: Page },
    /// Whether EL2 maps a page.
    Mapped { pfn: Pfn, expected: bool },
    /// A page that should have been wiped.
    NotZeros { pfn: Pfn },
    /// A guest page, by its number in the window.
    Guest { number: usize, real: Option<GuestEntry> },
    /// A guest page that was odd before.
    OddGuestEntry { gfn: u64 },
    /// Where the VM is in its life.
    Phase { expected: Phase, real: Phase },
    /// The number of pages that the VM counts.
    Count { expected: u64, real: u64 },
    /// An invariant that was broken before.
    Invariant(&'static str),
}

/// Whoever is shown differences.
pub(super) type Visit<'a> = dyn FnMut(Difference) + 'a;

/// All that is to be told.
pub(super) struct Report<'a> {
    pub(super) asked: Asked,
    pub(super) view: &'a View,
    /// What the specification says and what the core answered; `None` before the transition.
    pub(super) outcomes: Option<(Outcome, Outcome)>,
    /// Shows the differences.
    pub(super) differences: &'a dyn Fn(&mut Visit<'_>),
}

impl Report<'_> {
    /// Stops the machine with the report.
    #[cold]
    #[track_caller]
    #[expect(clippy::panic, reason = "the panic handler prints the report and stops all CPUs")]
    pub(super) fn stop(&self) -> ! {
        panic!("broken invariant: {self}")
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let window = &self.view.window;
        let name = CALLS[call(self.asked, window).kind()];
        match self.outcomes {
            Some(_) => write!(f, "core and specification disagree over {name}{}", Subject(self.asked))?,
            None => write!(f, "before {name}{}", Subject(self.asked))?,
        }
        let mut told = 0;
        let mut result = Ok(());
        (self.differences)(&mut |difference| {
            told += 1;
            if told <= TOLD && result.is_ok() {
                result = f.write_str("\n  ").and_then(|()| self.tell(f, difference));
            }
        });
        result?;
        match told {
            more if more > TOLD => write!(f, "\n  and {} differences more\n ", more - TOLD),
            _ => write!(f, "\n "),
        }
    }
}

impl Report<'_> {
    fn tell(&self, f: &mut fmt::Formatter<'_>, difference: Difference) -> fmt::Result {
        let window = &self.view.window;
        match difference {
            Difference::Outcome => {
                let Some((expected, real)) = self.outcomes else { return Ok(()) };
                write!(f, "outcome: specification: {}; core: {}", Told(expected), Told(real))
            }
            Difference::Page { number, real } => {
                let (before, expected) = self.view.page(number);
                let pfn = window.pfn(number).map_or(0, Pfn::as_u64);
                let say = |page| Whose { page, window };
                let (before, expected, real) = (say(before), say(expected), say(real));
                write!(f, "page {pfn:#x}: before: {before}; specification: {expected}; core: {real}")
            }
            Difference::Mapped { pfn, expected } => {
                let [expected, real] = if expected { ["mapped", "not"] } else { ["not mapped", "mapped"] };
                write!(f, "page {:#x} at EL2: specification: {expected}; core: {real}", pfn.as_u64())
            }
            Difference::NotZeros { pfn } => {
                write!(f, "page {:#x}: specification: wiped; core: it holds something", pfn.as_u64())
            }
            Difference::Guest { number, real } => {
                let entry = |state: &spec::State<_, 1, _>| state.vms[0].entries[number];
                let say = |entry| GuestHas { entry, window };
                let before = say(Some(entry(&self.view.before)));
                let expected = say(Some(entry(&self.view.expected)));
                let (gfn, real) = (window.gfn + number as u64, say(real));
                write!(f, "guest page {gfn:#x}: before: {before}; specification: {expected}; core: {real}")
            }
            Difference::OddGuestEntry { gfn } => {
                write!(f, "guest page {gfn:#x}: an entry that no rule knows")
            }
            Difference::Phase { expected, real } => {
                write!(f, "the VM: specification: {expected:?}; core: {real:?}")
            }
            Difference::Count { expected, real } => {
                write!(f, "pages of the VM: specification: {expected}; core: {real}")
            }
            Difference::Invariant(broken) => f.write_str(broken),
        }
    }
}

/// What a call is about.
struct Subject(Asked);

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Asked::PoolTopUp(_, pages)
            | Asked::ShareHyp(pages)
            | Asked::UnshareHyp(pages)
            | Asked::ForceReclaim(pages, _)
            | Asked::TakeRoot(_, pages) => write!(f, " of {}", run("page", pages)),
            Asked::Pin(page) | Asked::Unpin(page) | Asked::QueryPage(page) => {
                write!(f, " of {}", run("page", Pages::one(page)))
            }
            Asked::VmTopUp(vm, pages) | Asked::GiveBack(vm, pages) => {
                write!(f, " of {vm:?}: {}", run("page", pages))
            }
            Asked::DonateGuest(vm, pfns, gfns) | Asked::ShareGuest(vm, pfns, gfns, _) => {
                write!(f, " of {} to {vm:?} as {}", run("page", pfns), run("guest page", gfns))
            }
            Asked::UnshareGuest(vm, gfns)
            | Asked::ReclaimGuest(vm, gfns)
            | Asked::Share(vm, gfns)
            | Asked::Unshare(vm, gfns)
            | Asked::MayUnshare(vm, gfns)
            | Asked::Relinquish(vm, gfns)
            | Asked::GuardMap(vm, gfns)
            | Asked::GuardUnmap(vm, gfns) => write!(f, " of {vm:?}: {}", run("guest page", gfns)),
            Asked::TeardownStart(vm) | Asked::TeardownFinish(vm) => write!(f, " of {vm:?}"),
        }
    }
}

/// Consecutive pages, as a person would name them.
struct Named {
    what: &'static str,
    first: u64,
    count: u64,
}

fn run<F: Frame>(what: &'static str, pages: Pages<F>) -> Named {
    Named { what, first: pages.start().as_u64(), count: pages.count() }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, first, count } = *self;
        match count {
            1 => write!(f, "{what} {first:#x}"),
            _ => write!(f, "{what}s {first:#x} to {:#x}", first + count - 1),
        }
    }
}

/// An outcome, in words.
struct Told(Outcome);

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = OUTCOMES[self.0.kind()];
        match self.0 {
            Outcome::Done(1) => write!(f, "{name}, 1 page"),
            Outcome::Done(pages) | Outcome::Ended(pages) | Outcome::Asked(pages) => {
                write!(f, "{name}, {pages} pages")
            }
            Outcome::Page(_, true) => write!(f, "{name}, memory"),
            Outcome::Page(_, false) => write!(f, "{name}, no memory"),
            _ => f.write_str(name),
        }
    }
}

/// What the host's side says of a page.
struct Whose<'a> {
    page: Page,
    window: &'a Window,
}

impl fmt::Display for Whose<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = |vm: u8| match (vm, self.window.vm) {
            (0, Some(vm)) => Owner::Known(vm),
            (slot, _) => Owner::Slot(slot.wrapping_sub(1)),
        };
        match self.page.host {
            ODD => f.write_str("an entry that no rule knows")?,
            HostEntry::Owned => f.write_str("the host's alone")?,
            HostEntry::LentToHyp => f.write_str("the host's, lent to the hypervisor")?,
            HostEntry::LentToGuests(borrowers) => write!(f, "the host's, lent to {borrowers} guest pages")?,
            HostEntry::Borrowed => f.write_str("a guest's, shared with the host")?,
            HostEntry::Hyp(_) => f.write_str("the hypervisor's")?,
            HostEntry::Guest { vm: 0, gfn } => {
                write!(f, "{}'s alone, as guest page {:#x}", owner(0), self.window.gfn + u64::from(gfn))?;
            }
            HostEntry::Guest { vm, gfn } => {
                write!(f, "{}'s alone, as a guest page that ends in {gfn:#06x}", owner(vm))?;
            }
        }
        match self.page.pins {
            0 => Ok(()),
            pins => write!(f, ", pinned {pins} times"),
        }
    }
}

enum Owner {
    Known(VmHandle),
    Slot(u8),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(vm) => write!(f, "{vm:?}"),
            Self::Slot(slot) => write!(f, "vm{slot}"),
        }
    }
}

/// What a guest has at one of its pages.
struct GuestHas<'a> {
    entry: Option<GuestEntry>,
    window: &'a Window,
}

impl fmt::Display for GuestHas<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pfn, sharing) = match self.entry {
            None => return f.write_str("an entry that no rule knows"),
            Some(GuestEntry::Empty) => return f.write_str("nothing"),
            Some(GuestEntry::Device) => return f.write_str("a device"),
            Some(GuestEntry::Poisoned) => return f.write_str("poison"),
            Some(GuestEntry::Page { pfn, sharing }) => (usize::from(pfn), sharing),
        };
        match self.window.pfn(pfn) {
            Some(at) if pfn != ELSEWHERE => write!(f, "page {:#x}", at.as_u64())?,
            _ => f.write_str("a page far from here")?,
        }
        f.write_str(match sharing {
            Sharing::Owned => ", its own",
            Sharing::Shared => ", shared with the host",
            Sharing::Borrowed(_) => ", the host's",
        })
    }
}
