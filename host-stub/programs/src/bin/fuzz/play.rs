//! One program of calls after the other, each from a window of pages that are all the host's to the end of all its
//! VMs.

extern crate alloc;

use alloc::vec::Vec;

use abi::host::HostResult;
use abi::page::{Permissions, Pool};
use abi::{Error, HostCall, HostState, VmFlags, VmHandle};
use guest_stub::protocol::player::WINDOW;
use guest_stub::protocol::{PAGE_SIZE, RAM_BASE};
use host_programs::deed::{Answer, Deed, Series, Touch};
use host_programs::steps::Steps;
use host_programs::{Failure, failure, sys};
use spec::chooser::{Chooser, Dice};
use spec::state::{Content, GuestEntry, HostEntry, Phase, Sharing, VCPUS};
use spec::{Call, Outcome, Run, State, World, step};

use crate::guest::{Act, Doing, Guest};
use crate::supply::Supply;
use crate::tell::Tale;
use crate::watch::{CODE_SLOT, OFFSETS, Words};

/// Pages of the window: a 2 MiB region ends in their middle.
pub(crate) const P: usize = 32;
/// VMs of a program.
pub(crate) const V: usize = 4;
/// Guest pages of each: a 2 MiB region ends in their middle.
pub(crate) const G: usize = 12;

/// Calls of a program: this many at least, and up to three times as many, beside those that end its VMs.
const CALLS: u64 = 50;
/// After so many calls all pages are looked at.
const LOOK_AT_ALL: u64 = 32;
/// In one of so many programs the host gives pages of the window to the hypervisor's pools, which do not come back.
const LOSING: u64 = 16;
/// More pages than any memory has: a count that is meant to be absurd.
const ABSURD: u64 = 1 << 36;
/// Pages that can be pinned at a time.
const PINS: usize = 64;
const NANOSECONDS: u64 = 1_000_000_000;

/// What a run was asked for.
#[derive(Clone, Copy, Debug)]
struct Wish {
    seed: u64,
    calls: u64,
    nanoseconds: u64,
    program: Option<u64>,
}

impl Wish {
    fn read(arguments: &[&str]) -> Result<Self, Failure> {
        let mut wish = Self { seed: 1, calls: u64::MAX, nanoseconds: u64::MAX, program: None };
        for argument in arguments.iter().skip(1) {
            let number = |text: &str| text.parse().map_err(|_| failure!("no number: {argument}"));
            match argument.split_once('=') {
                Some(("seed", text)) => wish.seed = number(text)?,
                Some(("calls", text)) => wish.calls = number(text)?,
                Some(("seconds", text)) => wish.nanoseconds = number(text)?.saturating_mul(NANOSECONDS),
                Some(("program", text)) => wish.program = Some(number(text)?),
                _ => return Err(failure!("unknown argument: {argument}")),
            }
        }
        if wish.calls == u64::MAX && wish.nanoseconds == u64::MAX && wish.program.is_none() {
            wish.calls = 10_000;
        }
        Ok(wish)
    }
}

/// Hypervisor and specification, in what must be the same state.
pub(crate) struct Play<'a> {
    pub(crate) deed: &'a Deed,
    pub(crate) series: &'a mut Series,
    pub(crate) supply: Supply,
    pub(crate) chooser: Chooser,
    pub(crate) world: World,
    pub(crate) state: State<P, V, G>,
    pub(crate) guests: [Option<Guest>; V],
    /// Handles of the program's VMs, also of those that are gone.
    handles: [Option<VmHandle>; V],
    /// Empty lists with room, for the pages of the guests' tables.
    pub(crate) spare_lists: [Vec<u64>; V],
    /// What is in each page of the window.
    pub(crate) content: [Words; P],
    pub(crate) tale: Tale,
    /// How many pages the last call lacked.
    pub(crate) lacking: u64,
    /// Aborts that were injected before, and since.
    pub(crate) aborts_at_start: u64,
    pub(crate) aborts: u64,
    pub(crate) turn: usize,
    loses: bool,
    began: u64,
}

pub(crate) fn main(arguments: &[&str], steps: &mut Steps) -> Result<(), Failure> {
    let wish = Wish::read(arguments)?;
    let deed = Deed::open()?;
    let mut series = Series::default();
    let supply = Supply::new(&deed, &mut series)?;
    let Some(aborts_at_start) = deed.injected_aborts()? else {
        return Err(failure!("this build of the hypervisor has no test calls"));
    };
    let mut play = Play {
        deed: &deed,
        series: &mut series,
        supply,
        chooser: Chooser { dice: Dice::new(1), ends_with_space: false },
        world: World {
            pfn: 0,
            pages: P as u64,
            gfn: RAM_BASE / PAGE_SIZE + WINDOW,
            gfns: G as u64,
            pins: PINS,
        },
        state: State::new(),
        guests: [const { None }; V],
        handles: [None; V],
        spare_lists: core::array::from_fn(|_| Vec::with_capacity(256)),
        content: [[0; OFFSETS.len()]; P],
        tale: Tale::new(),
        lacking: 0,
        aborts_at_start,
        aborts: 0,
        turn: 0,
        loses: false,
        began: sys::now(),
    };
    steps.tell(format_args!(
        "Random calls of a host and its guests: seed {}, windows of {P} pages from {:#x} on.",
        wish.seed,
        play.supply.window() << 12
    ));
    let (programs, outcome) = play.programs(wish, steps);
    let seconds = (sys::now() - play.began) / NANOSECONDS;
    steps.tell(format_args!(
        "FUZZ seed={} programs={programs} calls={} aborts={} pairs={} seconds={seconds}",
        wish.seed,
        play.tale.calls,
        play.aborts,
        play.tale.pairs()
    ));
    let observed = match &outcome {
        Ok(()) => host_programs::steps::format(format_args!("yes, in {} calls", play.tale.calls)),
        Err(difference) => host_programs::steps::format(format_args!("{difference}")),
    };
    match &outcome {
        Ok(()) => play.tale.tell_pairs(steps),
        Err(difference) => {
            steps.tell(format_args!("Program {programs} of seed {} went so:", wish.seed));
            play.tale.tell_story(steps);
            steps.tell(format_args!("and then: {difference}"));
            steps.tell(format_args!("To see it again: seed={} program={programs}", wish.seed));
        }
    }
    steps.check("hypervisor-and-specification-agree", "yes", observed, outcome.is_ok());
    Ok(())
}

impl Play<'_> {
    /// Plays programs until enough is played. Returns the number of the last, or of the one that shows a difference.
    fn programs(&mut self, wish: Wish, steps: &Steps) -> (u64, Result<(), Failure>) {
        let mut number = wish.program.unwrap_or(0);
        let mut told = self.began;
        if let Err(failure) = self.enter_window() {
            return (number, Err(failure));
        }
        loop {
            if let Err(difference) = self.program(wish.seed, number) {
                return (number, Err(difference));
            }
            number += 1;
            let now = sys::now();
            if now - told > 5 * NANOSECONDS {
                told = now;
                steps.tell(format_args!(
                    "  {} calls in {} programs, {} s",
                    self.tale.calls,
                    number,
                    (now - self.began) / NANOSECONDS
                ));
            }
            let enough = self.tale.calls >= wish.calls || now - self.began >= wish.nanoseconds;
            if enough || wish.program.is_some() {
                return (number, Ok(()));
            }
        }
    }

    /// Makes what is in the window known.
    fn enter_window(&mut self) -> Result<(), Failure> {
        self.world.pfn = self.supply.window();
        self.content = [[0; OFFSETS.len()]; P];
        self.series.clear();
        for page in 0..P {
            for slot in 0..OFFSETS.len() {
                let address = self.address(page, slot);
                self.series.store(address, 0);
            }
        }
        self.deed.play(self.series)
    }

    /// Plays one program.
    fn program(&mut self, seed: u64, number: u64) -> Result<(), Failure> {
        let start = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd134_2543_de82_ef95);
        self.chooser.dice = Dice::new(start);
        // The first numbers of neighbouring starts are alike.
        (0..8).for_each(|_| _ = self.chooser.dice.next());
        self.state = State::new();
        // What earlier programs have left in the pages, the host knows.
        self.state.pages.iter_mut().for_each(|page| page.content = Content::Known);
        self.handles = [None; V];
        self.tale.begin();
        self.turn = 0;
        self.loses = number % LOSING == LOSING - 1 && self.supply.windows_left() > 1;
        let calls = CALLS + self.chooser.dice.below(2 * CALLS);
        for turn in 0..calls {
            self.one_turn()?;
            if turn % LOOK_AT_ALL == LOOK_AT_ALL - 1 {
                self.look_at_all()?;
            }
        }
        self.wind_up()?;
        self.look_at_all_that_is_left()
    }

    fn one_turn(&mut self) -> Result<(), Failure> {
        match self.chooser.dice.below(16) {
            0 => self.absurd_host_call()?,
            1 => self.absurd_guest_call()?,
            2 | 3 => self.other_access()?,
            _ => {
                let call = self.chooser.choose(&self.state);
                if let Some(call) = self.fit(call) {
                    let outcome = self.play(call)?;
                    self.serve_missing(call, outcome)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a call fit the window, behind which memory goes on; `None` if it cannot be played now.
    fn fit(&self, call: Call) -> Option<Call> {
        let run = |run: Run| {
            let fits = run.first < P as u64;
            fits.then(|| match run.count {
                ABSURD.. => run,
                count => Run { count: count.min(P as u64 - run.first), ..run },
            })
        };
        Some(match call {
            Call::PoolTopUp { .. } if !self.loses => return None,
            Call::PoolTopUp { pool, pfns } => Call::PoolTopUp { pool, pfns: run(pfns)? },
            Call::VmTopUp { vm, pfns } => Call::VmTopUp { vm, pfns: run(pfns)? },
            Call::ShareHyp { pfns } => Call::ShareHyp { pfns: run(pfns)? },
            Call::UnshareHyp { pfns } => Call::UnshareHyp { pfns: run(pfns)? },
            Call::DonateGuest { vm, pfn, gfn, count } => {
                let Run { first: pfn, count } = run(Run { first: pfn, count })?;
                Call::DonateGuest { vm, pfn, gfn, count }
            }
            Call::ShareGuest { vm, pfn, gfn, count, permissions } => {
                let Run { first: pfn, count } = run(Run { first: pfn, count })?;
                Call::ShareGuest { vm, pfn, gfn, count, permissions }
            }
            // What is not aligned is refused before anything is looked at.
            Call::VmCreate { root, .. } if root.is_multiple_of(2) && root + 2 > P as u64 => return None,
            Call::QueryPage { pfn } | Call::Pin { pfn } | Call::Unpin { pfn } | Call::HostStore { pfn }
                if pfn >= P as u64 =>
            {
                return None;
            }
            Call::Share { vm, gfns } => {
                self.whose_turn(vm, Call::Share { vm, gfns: self.to_gap(vm, gfns) })?
            }
            Call::Unshare { vm, vcpu, .. } => match self.stuck(vm, vcpu) {
                Some(Act::Call(again)) => again,
                Some(_) => return None,
                None => call,
            },
            Call::Share { vm, .. }
            | Call::Relinquish { vm, .. }
            | Call::GuardMap { vm, .. }
            | Call::GuardUnmap { vm, .. }
            | Call::GuestStore { vm, .. } => self.whose_turn(vm, call)?,
            other => other,
        })
    }

    /// The call of a guest that can be made now: this one if a vCPU asks for commands, else what a vCPU makes again.
    fn whose_turn(&self, vm: u8, call: Call) -> Option<Call> {
        if self.state.vms[usize::from(vm)].phase != Phase::Live
            || self.vcpu_for(vm, Act::Call(call)).is_some()
        {
            return Some(call);
        }
        (0..VCPUS as u8).find_map(|vcpu| match self.stuck(vm, vcpu) {
            Some(Act::Call(again)) => Some(again),
            _ => None,
        })
    }

    /// Makes a call on both sides. What the hypervisor lacks is given, and the call made again: it must not lack the
    /// same another time.
    pub(crate) fn play(&mut self, call: Call) -> Result<Outcome, Failure> {
        let mut lacked = [false; 3];
        loop {
            let real = self.real(call).map_err(|failure| failure!("{call:?}: {failure}"))?;
            let lack = match real {
                Outcome::Lacking(pool) => Some(pool),
                _ => None,
            };
            let (expected, next) = step(&self.world, &self.state, call, lack);
            self.tale.note(call, real);
            if real != expected {
                return Err(failure!("{call:?} came to {real:?}, and the specification says {expected:?}"));
            }
            let before = core::mem::replace(&mut self.state, next);
            self.forget_wiped();
            self.look_at_changes(&before)?;
            let Some(pool) = lack else { return Ok(real) };
            if core::mem::replace(&mut lacked[pool as usize], true) {
                return Err(failure!("{call:?}: what it lacked was given, and it lacks the same again"));
            }
            self.serve_lack(pool, self.lacking, call.vm())?;
        }
    }

    /// Gives the hypervisor what it lacks.
    pub(crate) fn serve_lack(&mut self, pool: Pool, pages: u64, vm: Option<u8>) -> Result<(), Failure> {
        let guest = vm.and_then(|vm| self.guests.get_mut(usize::from(vm))).and_then(Option::as_mut);
        self.supply.serve(self.deed, pool, pages, guest.map(|guest| (guest.handle, &mut guest.lent)))
    }

    /// A VM's handle; one that nobody has for a VM that was not made.
    pub(crate) fn handle(&self, vm: u8) -> VmHandle {
        let known = self.handles.get(usize::from(vm)).copied().flatten();
        known.unwrap_or_else(|| VmHandle::new(200, 7).expect("a handle can be so"))
    }

    /// Makes a call on the hypervisor, as whoever makes it.
    fn real(&mut self, call: Call) -> Result<Outcome, Failure> {
        let pfn = |first: u64| self.world.pfn.saturating_add(first);
        let gfn = |first: u64| self.world.gfn.saturating_add(first);
        let handle = |vm: u8| self.handle(vm);
        match call {
            Call::PoolTopUp { pool, pfns } => {
                self.host_call(HostCall::PoolTopUp { pool, pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::VmTopUp { vm, pfns } => {
                let (vm, pfn, pages) = (handle(vm), pfn(pfns.first), pfns.count);
                self.host_call(HostCall::VmTopUp { vm, pfn, pages })
            }
            Call::ShareHyp { pfns } => {
                self.host_call(HostCall::ShareHyp { pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::UnshareHyp { pfns } => {
                self.host_call(HostCall::UnshareHyp { pfn: pfn(pfns.first), pages: pfns.count })
            }
            Call::DonateGuest { vm, pfn: page, gfn: at, count: pages } => {
                let (vm, pfn, gfn) = (handle(vm), pfn(page), gfn(at));
                self.host_call(HostCall::DonateGuest { vm, pfn, gfn, pages })
            }
            Call::ShareGuest { vm, pfn: page, gfn: at, count: pages, permissions } => {
                let (vm, pfn, gfn) = (handle(vm), pfn(page), gfn(at));
                self.host_call(HostCall::ShareGuest { vm, pfn, gfn, pages, permissions })
            }
            Call::UnshareGuest { vm, gfns } => {
                let (vm, gfn, pages) = (handle(vm), gfn(gfns.first), gfns.count);
                self.host_call(HostCall::UnshareGuest { vm, gfn, pages })
            }
            Call::ReclaimGuest { vm, gfns } => {
                let (vm, gfn, pages) = (handle(vm), gfn(gfns.first), gfns.count);
                self.host_call(HostCall::ReclaimGuest { vm, gfn, pages })
            }
            Call::QueryPage { pfn: page } => {
                let Answer::Served(result) = self.deed.call(HostCall::QueryPage { pfn: pfn(page) })? else {
                    return Err(failure!("it is not served"));
                };
                match (result.outcome, HostState::from_word(result.values[0])) {
                    (Ok(()), Some(state)) => Ok(Outcome::Page(state, result.values[1] == 1)),
                    _ => self.outcome(result),
                }
            }
            Call::VmCreate { protected, immediate, root } => self.create(protected, immediate, pfn(root)),
            Call::UnshareAck { vm, vcpu } => {
                let lives = self.state.vms.get(usize::from(vm)).is_some_and(|vm| vm.phase == Phase::Live);
                if lives && usize::from(vcpu) < VCPUS {
                    let by_run = self.chooser.dice.below(4) == 0;
                    self.acknowledge(vm, vcpu, by_run)
                } else {
                    self.host_call(HostCall::UnshareAck { vm: handle(vm), vcpu: vcpu.into() })
                }
            }
            Call::VmTeardownStart { vm } => {
                let outcome = self.host_call(HostCall::VmTeardownStart { vm: handle(vm) })?;
                if let Outcome::Done(_) = outcome {
                    self.take_image_back(vm)?;
                }
                Ok(outcome)
            }
            Call::VmTeardownFinish { vm } => self.finish(vm),
            Call::Pin { pfn: page } => Ok(one(self.host_call(HostCall::TestPin { pfn: pfn(page) })?)),
            Call::Unpin { pfn: page } => Ok(one(self.host_call(HostCall::TestUnpin { pfn: pfn(page) })?)),
            Call::Share { vm, .. }
            | Call::Unshare { vm, .. }
            | Call::Relinquish { vm, .. }
            | Call::GuardMap { vm, .. }
            | Call::GuardUnmap { vm, .. } => self.guest_acts(vm, Act::Call(call)),
            Call::GuestStore { vm, gfn } => self.guest_store(vm, gfn, call),
            Call::HostStore { pfn: page } => self.host_store(page as usize),
            Call::Map { .. } | Call::Unmap { .. } | Call::Hold { .. } | Call::Release { .. } => {
                Err(failure!("the host's books are not the hypervisor's"))
            }
        }
    }

    /// Makes a host's call; its result in the specification's words.
    pub(crate) fn host_call(&mut self, call: HostCall) -> Result<Outcome, Failure> {
        match self.deed.call(call)? {
            Answer::Served(result) => self.outcome(result),
            other => Err(failure!("{call:?}: {other}")),
        }
    }

    fn outcome(&mut self, result: HostResult) -> Result<Outcome, Failure> {
        let [first, second, ..] = result.values;
        Ok(match result.outcome {
            Ok(()) => Outcome::Done(first),
            Err(Error::NoMemory) => {
                self.lacking = first;
                Outcome::Lacking(
                    Pool::from_word(second).ok_or_else(|| failure!("there is no pool {second}"))?,
                )
            }
            Err(error) => Outcome::Refused(error),
        })
    }

    fn create(&mut self, protected: bool, immediate: bool, root: u64) -> Result<Outcome, Failure> {
        let flags = VmFlags { protected, unshare_immediate: immediate, mmio_unguarded: false };
        let unborn = self.state.vms.iter().position(|vm| vm.phase == Phase::Unborn);
        let Some(number) = unborn else {
            // The hypervisor has room for more VMs than the window.
            return Ok(Outcome::Refused(Error::Busy));
        };
        let word = match self.host_call(HostCall::VmCreate { flags, root })? {
            Outcome::Done(word) => word,
            refused => return Ok(refused),
        };
        let handle = VmHandle::from_word(word).ok_or_else(|| failure!("{word:#x} is no handle"))?;
        self.handles[number] = Some(handle);
        self.bring_up(number as u8, handle, protected)?;
        Ok(Outcome::Created(number as u8))
    }

    fn finish(&mut self, vm: u8) -> Result<Outcome, Failure> {
        let handle = self.handle(vm);
        let mut back = 0;
        loop {
            let call = HostCall::VmTeardownFinish { vm: handle };
            let Answer::Served(result) = self.deed.call(call)? else {
                return Err(failure!("it is not served"));
            };
            let [done, left, ..] = result.values;
            if result.outcome.is_err() {
                return self.outcome(result);
            }
            back += done;
            if left == 0 {
                break;
            }
        }
        let Some(mut guest) = self.guests.get_mut(usize::from(vm)).and_then(Option::take) else {
            return Err(failure!("a VM that was not made is gone"));
        };
        let hidden = guest.lent.len() as u64;
        self.supply.put_back(&mut guest.lent);
        self.spare_lists[usize::from(vm)] = guest.lent;
        Ok(Outcome::Ended(back.saturating_sub(hidden)))
    }

    fn guest_acts(&mut self, vm: u8, act: Act) -> Result<Outcome, Failure> {
        let lives = self.state.vms.get(usize::from(vm)).is_some_and(|vm| vm.phase == Phase::Live);
        if lives { self.act(vm, act) } else { Ok(Outcome::NotServed) }
    }

    fn guest_store(&mut self, vm: u8, gfn: u64, call: Call) -> Result<Outcome, Failure> {
        let act = Act::Call(call);
        let vcpu = self.vcpu_for(vm, act);
        let outcome = self.guest_acts(vm, act)?;
        if let (Outcome::Done(_), Some(vcpu), Some(page)) = (outcome, vcpu, self.page_of(vm, gfn)) {
            let (slot, value) = self.touch_of(vm, vcpu)?;
            self.content[page][slot] = value;
        }
        Ok(outcome)
    }

    fn host_store(&mut self, page: usize) -> Result<Outcome, Failure> {
        let (slot, value) = self.dice_touch();
        let at = self.address(page, slot);
        match self.deed.store(at, value)? {
            Touch::Done(_) => {
                self.content[page][slot] = value;
                Ok(Outcome::Done(1))
            }
            touch if touch.is_injected_abort(at) => {
                self.aborts += 1;
                Ok(Outcome::Aborted)
            }
            touch => Err(failure!("{touch}")),
        }
    }

    /// The page of the window that a guest has at a guest page.
    fn page_of(&self, vm: u8, gfn: u64) -> Option<usize> {
        match self.state.vms.get(usize::from(vm))?.entries.get(gfn as usize)? {
            GuestEntry::Page { pfn, .. } => Some(usize::from(*pfn)),
            _ => None,
        }
    }

    /// Gives a guest the page that it misses, mostly, and lets it go on.
    fn serve_missing(&mut self, call: Call, outcome: Outcome) -> Result<(), Failure> {
        let (Outcome::Missing(gfn), Some(vm)) = (outcome, call.vm()) else { return Ok(()) };
        if self.is_device(vm, gfn) && matches!(call, Call::GuestStore { .. })
            || self.chooser.dice.below(8) == 0
        {
            return Ok(());
        }
        if self.give(vm, gfn, None)? {
            self.play(call)?;
        }
        Ok(())
    }

    /// Gives a guest memory at a guest page, with everything allowed; `false` if the host has none to give.
    fn give(&mut self, vm: u8, gfn: u64, code: Option<u64>) -> Result<bool, Failure> {
        let from = self.chooser.dice.below(P as u64) as usize;
        if let Some(GuestEntry::Page { sharing: Sharing::Borrowed(_), .. }) =
            self.state.vms[usize::from(vm)].entries.get(gfn as usize)
        {
            // It has a page, with too little allowed.
            self.play(Call::UnshareGuest { vm, gfns: Run::one(gfn) })?;
        }
        let owned = |page: &usize| self.state.pages[*page].host == HostEntry::Owned;
        let Some(page) = (0..P).map(|page| (page + from) % P).find(owned) else { return Ok(false) };
        if let Some(code) = code {
            let (at, pfn) = (self.address(page, CODE_SLOT), page as u64);
            self.play(Call::HostStore { pfn })?;
            match self.deed.store(at, code)? {
                Touch::Done(_) => self.content[page][CODE_SLOT] = code,
                touch => return Err(failure!("the host cannot store to its page {page}: {touch}")),
            }
        }
        let (pfn, count) = (page as u64, 1);
        let outcome = if self.state.vms[usize::from(vm)].protected {
            self.play(Call::DonateGuest { vm, pfn, gfn, count })?
        } else {
            self.play(Call::ShareGuest { vm, pfn, gfn, count, permissions: Permissions::ALL })?
        };
        Ok(matches!(outcome, Outcome::Done(1)))
    }

    /// A guest loads, or fetches an instruction: accesses that the specification's calls do not have.
    fn other_access(&mut self) -> Result<(), Failure> {
        let vm = self.chooser.dice.below(V as u64) as u8;
        let gfn = self.chooser.dice.below(G as u64);
        let load = self.chooser.dice.below(3) > 0;
        let act = if load { Act::Load { gfn } } else { Act::Fetch { gfn } };
        if self.state.vms[usize::from(vm)].phase != Phase::Live || self.vcpu_for(vm, act).is_none() {
            return Ok(());
        }
        if load { self.guest_loads(vm, gfn) } else { self.guest_fetches(vm, gfn) }
    }

    fn guest_loads(&mut self, vm: u8, gfn: u64) -> Result<(), Failure> {
        for _ in 0..2 {
            let act = Act::Load { gfn };
            let Some(vcpu) = self.vcpu_for(vm, act) else { return Ok(()) };
            self.tale.calls += 1;
            let outcome = self.act(vm, act)?;
            let (slot, _) = self.touch_of(vm, vcpu)?;
            let expected = match self.page_of(vm, gfn) {
                Some(page) => Outcome::Done(self.content[page][slot]),
                None => Outcome::Missing(gfn),
            };
            if outcome != expected {
                return Err(failure!(
                    "a load of VM {vm}, vCPU {vcpu} at guest page {gfn} came to {outcome:x?}, and should to {expected:x?}"
                ));
            }
            if expected != Outcome::Missing(gfn) || self.is_device(vm, gfn) || !self.give(vm, gfn, None)? {
                break;
            }
        }
        Ok(())
    }

    /// A guest calls code in a page. Where there is something else it is not tried, so that the guest lives.
    fn guest_fetches(&mut self, vm: u8, gfn: u64) -> Result<(), Failure> {
        let act = Act::Fetch { gfn };
        let expected = match self.state.vms[usize::from(vm)].entries[gfn as usize] {
            GuestEntry::Page { pfn, sharing } => {
                let is_code = self.content[usize::from(pfn)][CODE_SLOT] != 0;
                match sharing {
                    Sharing::Borrowed(allowed) if !allowed.execute => Outcome::Missing(gfn),
                    _ if is_code => Outcome::Done(0),
                    _ => return Ok(()),
                }
            }
            GuestEntry::Device => Outcome::Aborted,
            GuestEntry::Empty => Outcome::Missing(gfn),
        };
        if expected == Outcome::Missing(gfn)
            && !self.state.pages.iter().any(|page| page.host == HostEntry::Owned)
        {
            return Ok(());
        }
        self.tale.calls += 1;
        let outcome = self.act(vm, act)?;
        if outcome != expected {
            return Err(failure!(
                "a fetch of VM {vm} at guest page {gfn} came to {outcome:x?}, and should to {expected:x?}"
            ));
        }
        if outcome == Outcome::Missing(gfn) {
            let (_, code) = (0, u64::from(guest_stub::protocol::player::RET));
            if !self.give(vm, gfn, Some(code))? {
                return Err(failure!("no page for a guest's code"));
            }
            let outcome = self.act(vm, act)?;
            if outcome != Outcome::Done(0) {
                return Err(failure!(
                    "a fetch of VM {vm} at guest page {gfn} that is there came to {outcome:x?}"
                ));
            }
        }
        Ok(())
    }

    /// Ends all VMs and takes everything back.
    fn wind_up(&mut self) -> Result<(), Failure> {
        for pfn in 0..P as u64 {
            while self.state.pages[pfn as usize].pins > 0 {
                self.play(Call::Unpin { pfn })?;
            }
            if self.state.pages[pfn as usize].host == HostEntry::LentToHyp {
                self.play(Call::UnshareHyp { pfns: Run::one(pfn) })?;
            }
        }
        for vm in 0..V as u8 {
            let of = self.state.vms[usize::from(vm)];
            if of.phase == Phase::Live {
                self.play(Call::VmTeardownStart { vm })?;
            }
            for gfn in 0..G as u64 {
                if self.page_of(vm, gfn).is_some() {
                    let gfns = Run { first: gfn, count: G as u64 - gfn };
                    let call = if of.protected {
                        Call::ReclaimGuest { vm, gfns }
                    } else {
                        Call::UnshareGuest { vm, gfns }
                    };
                    self.play(call)?;
                }
            }
            if self.state.vms[usize::from(vm)].phase == Phase::Dying {
                self.play(Call::VmTeardownFinish { vm })?;
            }
        }
        Ok(())
    }

    /// Looks at the window after a program, and leaves it if pages are lost.
    fn look_at_all_that_is_left(&mut self) -> Result<(), Failure> {
        self.look_at_all()?;
        if let Some(vm) = self.guests.iter().position(Option::is_some) {
            return Err(failure!("VM {vm} is still there"));
        }
        let mut lost = false;
        for (number, page) in self.state.pages.iter().enumerate() {
            match page.host {
                HostEntry::Owned => {}
                HostEntry::Hyp(spec::state::Use::Pool) => lost = true,
                _ => return Err(failure!("page {number} did not come back: {:?}", page.host)),
            }
        }
        if lost {
            self.supply.next_window()?;
            self.enter_window()?;
        }
        Ok(())
    }

    fn touch_of(&mut self, vm: u8, vcpu: u8) -> Result<(usize, u64), Failure> {
        Ok(self.guest(vm)?.last_touch(vcpu))
    }

    /// A vCPU that asks for commands.
    pub(crate) fn idle_vcpu(&self, vm: u8) -> Option<u8> {
        let guest = self.guests.get(usize::from(vm))?.as_ref()?;
        (0..VCPUS as u8).find(|vcpu| guest.doing[usize::from(*vcpu)] == Doing::Asks)
    }
}

/// The outcome of a call about one page that does not say so.
fn one(outcome: Outcome) -> Outcome {
    if let Outcome::Done(_) = outcome { Outcome::Done(1) } else { outcome }
}
