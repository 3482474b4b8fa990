//! One program of calls after the other, each from a window of pages that are all the host's to the end of all its
//! VMs.

extern crate alloc;

use alloc::vec::Vec;

use abi::VmHandle;
use abi::page::Pool;
use guest_stub::protocol::player::WINDOW;
use guest_stub::protocol::{PAGE_SIZE, RAM_BASE};
use host_programs::cpu::Cpu;
use host_programs::deed::Deed;
use host_programs::series::Series;
use host_programs::steps::Steps;
use host_programs::{Failure, failure, sys};
use spec::chooser::{Chooser, Dice};
use spec::state::{Content, HostEntry, Phase, VCPUS};
use spec::{Call, Outcome, Run, State, World, step};

use crate::guest::{Act, Guest};
use crate::supply::Supply;
use crate::tell::Tale;
use crate::watch::{OFFSETS, Words};

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
/// After so many programs all records are counted.
const COUNT_RECORDS: u64 = 16;
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
    cpus: u64,
}

impl Wish {
    fn read(arguments: &[&str]) -> Result<Self, Failure> {
        let mut wish = Self { seed: 1, calls: u64::MAX, nanoseconds: u64::MAX, program: None, cpus: 1 };
        for argument in arguments.iter().skip(1) {
            let number = |text: &str| text.parse().map_err(|_| failure!("no number: {argument}"));
            match argument.split_once('=') {
                Some(("seed", text)) => wish.seed = number(text)?,
                Some(("calls", text)) => wish.calls = number(text)?,
                Some(("seconds", text)) => wish.nanoseconds = number(text)?.saturating_mul(NANOSECONDS),
                Some(("cpus", text)) => wish.cpus = number(text)?,
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
    pub(crate) handles: [Option<VmHandle>; V],
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
    /// Bytes of records that were in use before.
    records_at_start: u64,
    /// A page of the hypervisor's image.
    pub(crate) image: u64,
    pub(crate) turn: usize,
    /// Another CPU, for calls that are made at the same time.
    pub(crate) other: Option<Cpu<'a>>,
    /// How often two calls were, and in how many of these only the other CPU's can have been the first.
    pub(crate) duels: [u64; 2],
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
    let image = deed.find_hypervisor_page()?;
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
        records_at_start: records(&deed)?,
        image,
        turn: 0,
        other: if wish.cpus > 1 { Some(Cpu::on(&deed, 1)?) } else { None },
        duels: [0; 2],
        loses: false,
        began: sys::now(),
    };
    steps.tell(format_args!(
        "Random calls of a host and its guests: seed {}, windows of {P} pages from {:#x} on.",
        wish.seed,
        play.supply.window() << 12
    ));
    let (programs, outcome) = play.programs(wish, steps);
    let nanoseconds = sys::now() - play.began;
    steps.tell(format_args!(
        "FUZZ seed={} programs={programs} calls={} aborts={} pairs={} nanoseconds={nanoseconds}",
        wish.seed,
        play.tale.calls,
        play.aborts,
        play.tale.pairs()
    ));
    if let Some(cpu) = play.other.take() {
        let [all, other_first] = play.duels;
        steps.tell(format_args!(
            "  {all} times two calls were made at once; {other_first} times only the other CPU's can have been the first"
        ));
        if outcome.is_ok() {
            cpu.off()?;
        }
    }
    let observed = match &outcome {
        Ok(()) => host_programs::steps::format(format_args!(
            "yes, in {} calls, {} a second",
            play.tale.calls,
            play.tale.calls.saturating_mul(NANOSECONDS) / nanoseconds.max(1)
        )),
        Err(difference) => host_programs::steps::format(format_args!("{difference}")),
    };
    match &outcome {
        Ok(()) => play.tale.tell_pairs(steps),
        Err(difference) => {
            steps.tell(format_args!("Program {programs} of seed {} went so:", wish.seed));
            play.tale.tell_story(steps);
            steps.tell(format_args!("and then: {difference}"));
            steps.tell(format_args!(
                "To see it again: cargo xtask fuzz --seed {} --program {programs}{}",
                wish.seed,
                if wish.cpus > 1 { " --cpus 2 (not each time: it depends on who is first)" } else { "" }
            ));
        }
    }
    steps.check("hypervisor-and-specification-agree", "yes", observed, outcome.is_ok());
    Ok(())
}

/// Bytes of records that are in use.
fn records(deed: &Deed) -> Result<u64, Failure> {
    let census = deed.census()?;
    census
        .map(|census| census.metadata)
        .ok_or_else(|| failure!("this build of the hypervisor counts nothing"))
}

impl Play<'_> {
    /// Plays programs until enough is played. Returns the number of the last, or of the one that shows a difference.
    fn programs(&mut self, wish: Wish, steps: &Steps) -> (u64, Result<(), Failure>) {
        let mut number = wish.program.unwrap_or(0);
        let mut told = self.began;
        loop {
            let mut played = self.program(wish.seed, number);
            if wish.program.is_some() || number % COUNT_RECORDS == COUNT_RECORDS - 1 {
                played = played.and_then(|()| self.count_records());
            }
            if let Err(difference) = played {
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

    /// Makes what is in the window known, whatever earlier programs have left there.
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
        self.deed.series(self.series)
    }

    /// Plays one program.
    fn program(&mut self, seed: u64, number: u64) -> Result<(), Failure> {
        let start = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd134_2543_de82_ef95);
        self.chooser.dice = Dice::new(start);
        // The first numbers of neighbouring starts are alike.
        (0..8).for_each(|_| _ = self.chooser.dice.next());
        self.state = State::new();
        self.state.pages.iter_mut().for_each(|page| page.content = Content::Known);
        self.enter_window()?;
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
            4..=7 if self.other.is_some() => self.duel()?,
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
    pub(crate) fn fit(&self, call: Call) -> Option<Call> {
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
            Call::ForceReclaim { pfns } => Call::ForceReclaim { pfns: run(pfns)? },
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
            let real = self.real(call).map_err(|failure| failure!("{call}: {failure}"))?;
            let lack = match real {
                Outcome::Lacking(pool) => Some(pool),
                _ => None,
            };
            let (expected, next) = step(&self.world, &self.state, call, lack);
            self.tale.note_call(call, real);
            if real != expected {
                return Err(failure!("{call} came to: {real}; the specification says: {expected}"));
            }
            let before = core::mem::replace(&mut self.state, next);
            self.forget_wiped();
            self.look_at_changes(&before)?;
            let Some(pool) = lack else { return Ok(real) };
            if core::mem::replace(&mut lacked[pool as usize], true) {
                return Err(failure!("{call}: what it lacked was given, and it lacks the same again"));
            }
            self.serve_lack(pool, self.lacking, call.vm())?;
        }
    }

    /// Gives the hypervisor what it lacks.
    pub(crate) fn serve_lack(&mut self, pool: Pool, pages: u64, vm: Option<u8>) -> Result<(), Failure> {
        let guest = vm.and_then(|vm| self.guests.get_mut(usize::from(vm))).and_then(Option::as_mut);
        self.supply.serve(self.deed, pool, pages, guest.map(|guest| (guest.handle, &mut guest.lent)))
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

    /// Counts the records, which are as many as before the first program, since there is no VM.
    fn count_records(&self) -> Result<(), Failure> {
        let records = records(self.deed)?;
        if records == self.records_at_start {
            return Ok(());
        }
        Err(failure!(
            "{records} bytes of records are in use without a VM, and {} were at the start",
            self.records_at_start
        ))
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
        }
        Ok(())
    }
}
