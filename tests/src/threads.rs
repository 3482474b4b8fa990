//! Two CPUs that make a call each at the same time, and a third that touches the pages meanwhile, under a schedule
//! that shuttle decides.
//!
//! A CPU can be stopped before each operation of the [`Machine`](hyp::machine::Machine), each lock and each atomic,
//! and another goes on. Afterwards there must be an order of all that was done, one after the other, in which the
//! specification gives the same outcomes and the same state; and what ended before something else began comes first
//! in it.

use crate::real::Real;
use abi::exit::Exit;
use abi::host::HostCall;
use abi::{Error, VmHandle, guest, smccc};
use hyp::addr::Gfn;
use hyp::ownership::query::AbortAnswer;
use hyp::testing::{Step, World, become_cpu, this_cpu};
use hyp::vm::context::{Context, Trap};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use spec::state::{Content, Phase};
use spec::{Call, Outcome, Run, State, step};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

/// Pages of the world: the first four are in a block that the host has whole, the rest in a region of pages.
pub const P: usize = 20;
/// VMs.
pub const V: usize = 4;
/// Guest pages of each: a region ends in their middle.
pub const G: usize = 4;
/// Where guests begin.
const GFN: u64 = 0x1fe;
/// Where all that lies.
const WINDOW: spec::World = Core::window(GFN);
/// Table pages of the host's pool at boot.
const POOL: u64 = 0x40;
/// Table pages that each VM is given before it starts.
const TABLES: u64 = 8;

/// The state of the world.
pub type Small = State<P, V, G>;

type Core = Real<P, V, G>;

/// Word that a host writes, and word that a guest writes.
const WRITTEN: u64 = 0x6465_6564;
/// How often an access is tried again before it is taken for a loop.
const TRIES: usize = 16;
/// Points of a schedule at which [`PctScheduler`] may stop a CPU that it favours, plus one.
const DEPTH: usize = 4;

/// ESR_EL2 of an HVC with immediate 0, and of a store that found no translation at level 3.
const HVC: u64 = 0x16 << 26 | 1 << 25;
const STORE: u64 = 0x24 << 26 | 1 << 25 | 1 << 6 | 0b00_0111;

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A call, of the host or of a guest. A guest makes it from a vCPU that runs.
    Call(Call),
    /// The host enters a vCPU, which settles an unshare that it waits for.
    Enter {
        /// Number of the VM.
        vm: u8,
        /// Which of its vCPUs.
        vcpu: u8,
    },
    /// The host loads from a page.
    Load {
        /// Number of the page.
        pfn: u64,
    },
}

impl Op {
    /// The vCPU that it needs for itself, if a CPU does it that runs a guest's `vcpu` if it runs one.
    fn claims(self, vcpu: u8) -> Option<(u8, u8)> {
        match self {
            Self::Enter { vm, vcpu } => Some((vm, vcpu)),
            Self::Call(Call::UnshareAck { vm, vcpu }) => Some((vm, vcpu)),
            Self::Call(
                Call::Share { vm, .. }
                | Call::Unshare { vm, .. }
                | Call::Relinquish { vm, .. }
                | Call::GuardMap { vm, .. }
                | Call::GuardUnmap { vm, .. }
                | Call::GuestStore { vm, .. },
            ) => Some((vm, vcpu)),
            _ => None,
        }
    }

    /// The same with the vCPU that makes it, where the specification wants to know.
    fn by(self, vcpu: u8) -> Self {
        match self {
            Self::Call(Call::Unshare { vm, gfns, .. }) => Self::Call(Call::Unshare { vm, vcpu, gfns }),
            other => other,
        }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Got {
    Outcome(Outcome),
    /// The value that a load found.
    Value(u64),
}

/// Something that a CPU did, from when to when.
#[derive(Clone, Copy, Debug)]
struct Event {
    cpu: usize,
    op: Op,
    vcpu: u8,
    began: usize,
    /// When it ended and with what; or it has not.
    ended: Option<(usize, Got)>,
}

std::thread_local! {
    /// What the present execution has done. (All CPUs of an execution are one thread of the build machine.)
    static STORY: RefCell<Vec<Event>> = const { RefCell::new(Vec::new()) };
    static NOW: RefCell<usize> = const { RefCell::new(0) };
}

fn now() -> usize {
    NOW.with_borrow_mut(|now| {
        *now += 1;
        *now
    })
}

/// Where two CPUs start from.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Its name.
    pub name: &'static str,
    /// The calls that lead to it, each of which must succeed.
    pub calls: &'static [Call],
    /// The vCPUs by which the two CPUs run guests.
    pub vcpus: [u8; 2],
}

impl Start {
    /// The state there.
    pub fn state(&self) -> Small {
        let mut state = Small::new();
        for call in self.calls {
            let (outcome, next) = step(&WINDOW, &state, *call, None);
            assert!(!outcome.is_refusal(), "{}: {call:?} is refused: {outcome:?}", self.name);
            state = next;
        }
        state
    }
}

/// Two operations, from a start.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Its name.
    pub number: (usize, usize),
    /// Where it starts.
    pub start: Start,
    /// The state there.
    pub state: Small,
    /// What is done.
    pub ops: [Op; 2],
}

impl Pair {
    /// Name by which it can be asked for.
    pub fn name(&self) -> String {
        format!("{}/{}+{}", self.start.name, self.number.0, self.number.1)
    }

    /// Whether it matters who comes first, or both change something.
    pub fn is_relevant(&self) -> bool {
        let [a, b] = self.ops;
        let after = |state: &Small, op: Op| serial(state, op);
        let (a_first, then) = after(&self.state, a);
        let (b_second, _) = after(&then, b);
        let (b_first, other) = after(&self.state, b);
        let (a_second, _) = after(&other, a);
        a_first != a_second || b_first != b_second || then != self.state && other != self.state
    }
}

/// What the specification says of an operation.
fn serial(state: &Small, op: Op) -> (String, Small) {
    match op {
        Op::Call(call) => {
            let (outcome, next) = step(&WINDOW, state, call, None);
            (format!("{outcome:?}"), next)
        }
        Op::Enter { vm, vcpu } => {
            let (outcome, next) = step(&WINDOW, state, Call::UnshareAck { vm, vcpu }, None);
            (format!("{outcome:?}"), next)
        }
        Op::Load { pfn } => {
            let page = &state.pages[pfn as usize];
            let found = page.host_state().is_accessible().then_some(page.content);
            (format!("{found:?}"), *state)
        }
    }
}

/// The core in a starting state.
struct Stage {
    real: Core,
    state: Small,
    /// Translations of the VMs that are there.
    guests: Vec<sim::Stage2>,
}

impl Stage {
    fn new(start: &Start) -> Self {
        let real = Core::on(World::cold(POOL), GFN);
        let mut state = Small::new();
        let mut guests = Vec::new();
        for call in start.calls {
            let outcome = real.play(*call);
            let (expected, next) = step(&WINDOW, &state, *call, None);
            assert_eq!(outcome, expected, "{call:?}");
            state = next;
            if let Outcome::Created(vm) = outcome {
                real.supply(abi::page::Pool::Vm, Some(vm), TABLES);
                guests.push(real.core().guest(real.handle(vm)));
            }
        }
        Self { real, state, guests }
    }

    fn core(&self) -> &World {
        self.real.core()
    }

    /// Lets the TLBs of all CPUs hold what they may of the pages at stake.
    fn fill_tlbs(&self) {
        for cpu in 0..hyp::testing::CPUS {
            for page in 0..G as u64 {
                let at = (WINDOW.pfn + page) << 12;
                let _ = self.core().sim().guest_or_host_read(cpu, self.core().host(), at);
                for guest in &self.guests {
                    let at = (WINDOW.gfn + page) << 12;
                    let _ = self.core().sim().guest_or_host_read(cpu, *guest, at);
                }
            }
        }
    }

    /// Does something on this CPU and notes it.
    fn perform(self: &Arc<Self>, op: Op, vcpu: u8) {
        let (cpu, began) = (this_cpu(), now());
        let number = STORY.with_borrow_mut(|story| {
            story.push(Event { cpu, op, vcpu, began, ended: None });
            story.len() - 1
        });
        let got = match op {
            Op::Load { pfn } => match self.host_access(pfn, false) {
                Some(value) => Got::Value(value),
                None => Got::Outcome(Outcome::Aborted),
            },
            Op::Enter { vm, vcpu } => Got::Outcome(self.enter(vm, vcpu)),
            Op::Call(call) => Got::Outcome(self.call(call, vcpu)),
        };
        let ended = Some((now(), got));
        STORY.with_borrow_mut(|story| story[number].ended = ended);
    }

    fn call(self: &Arc<Self>, call: Call, vcpu: u8) -> Outcome {
        match call {
            Call::HostStore { pfn } => match self.host_access(pfn, true) {
                Some(_) => Outcome::Done(1),
                None => Outcome::Aborted,
            },
            Call::GuestStore { vm, gfn } => self.guest_store(vm, vcpu, gfn),
            Call::Share { vm, gfns } => self.guest_call(vm, vcpu, guest::MEM_SHARE, gfns),
            Call::Unshare { vm, vcpu, gfns } => self.guest_call(vm, vcpu, guest::MEM_UNSHARE, gfns),
            Call::Relinquish { vm, gfns } => self.guest_call(vm, vcpu, guest::MEM_RELINQUISH, gfns),
            Call::GuardMap { vm, gfns } => self.guest_call(vm, vcpu, guest::MMIO_GUARD_MAP, gfns),
            Call::GuardUnmap { vm, gfns } => self.guest_call(vm, vcpu, guest::MMIO_GUARD_UNMAP, gfns),
            host => self.real.play(host),
        }
    }

    /// An access of the host to a word of a page, as its EL1 makes it: what aborts goes to EL2, which decides
    /// whether it is tried again. The value that a load finds.
    fn host_access(&self, pfn: u64, write: bool) -> Option<u64> {
        let page = WINDOW.pfn + pfn;
        let gfn = Gfn::new(page).expect("a page");
        let access = if write { abi::exit::Access::Write } else { abi::exit::Access::Read };
        for _ in 0..TRIES {
            let sim = self.core().hyp.machine().step();
            let done = if write {
                sim.guest_or_host_write(this_cpu(), self.core().host(), page << 12, WRITTEN).map(|()| 0)
            } else {
                sim.guest_or_host_read(this_cpu(), self.core().host(), page << 12)
            };
            match done {
                Ok(value) => return Some(value),
                Err(_) if self.core().hyp.host_abort(gfn, access) == AbortAnswer::Inject => return None,
                Err(_) => {}
            }
        }
        panic!("an access of the host is tried again and again");
    }

    /// Runs a vCPU with these steps. What it exits with, and how it was refused.
    fn run(&self, vm: u8, vcpu: u8, steps: Vec<Step>) -> Result<Exit, Error> {
        let machine = self.core().hyp.machine();
        machine.drop_steps();
        steps.into_iter().for_each(|step| machine.push_step(step));
        let vm: VmHandle = self.real.handle(vm);
        let result = self.core().call(HostCall::VcpuRun { vm, vcpu: vcpu.into(), values: [0; 4] });
        machine.drop_steps();
        result.outcome.map(|()| Exit::from_words(result.values).expect("an exit"))
    }

    /// A guest's call from a vCPU.
    fn guest_call(&self, vm: u8, vcpu: u8, function: u32, gfns: Run) -> Outcome {
        let base = WINDOW.gfn;
        let call = [u64::from(function), (base + gfns.first) << 12, gfns.count, 0];
        let answer = Answer::default();
        let steps = vec![
            Box::new(move |context: &mut Context| {
                call.into_iter().zip(0..).for_each(|(x, at)| context.set_x(at, x));
                Trap::Sync { esr: HVC, far: 0, hpfar: 0 }
            }) as Step,
            answer.look(),
        ];
        match self.run(vm, vcpu, steps) {
            Err(error) => not_entered(error),
            Ok(Exit::Unshare { pages, .. }) => Outcome::Asked(pages),
            Ok(Exit::MissingPage { ipa, .. }) => Outcome::Missing((ipa >> 12) - base),
            Ok(Exit::NeedPages { pool, .. }) => Outcome::Lacking(pool),
            Ok(_) => answer.outcome(),
        }
    }

    /// A guest's store to a word of a page.
    fn guest_store(self: &Arc<Self>, vm: u8, vcpu: u8, gfn: u64) -> Outcome {
        let ipa = (WINDOW.gfn + gfn) << 12;
        let stored = Arc::new(Mutex::new(false));
        let stage2 = self.guests[usize::from(vm)];
        let again = |_| {
            let (stored, stage) = (Arc::clone(&stored), Arc::clone(self));
            Box::new(move |_: &mut Context| {
                let sim = stage.core().hyp.machine().step();
                match sim.guest_or_host_write(this_cpu(), stage2, ipa, WRITTEN) {
                    Ok(()) => {
                        *stored.lock().expect("nobody fails here") = true;
                        Trap::Irq
                    }
                    Err(_) => Trap::Sync { esr: STORE, far: ipa, hpfar: ipa >> 12 << 4 },
                }
            }) as Step
        };
        match self.run(vm, vcpu, (0..TRIES).map(again).collect()) {
            Err(error) => not_entered(error),
            Ok(_) if *stored.lock().expect("nobody fails here") => Outcome::Done(1),
            Ok(_) => Outcome::Missing(gfn),
        }
    }

    /// The host enters a vCPU; the guest looks at the answer of its last call.
    fn enter(&self, vm: u8, vcpu: u8) -> Outcome {
        let answer = Answer::default();
        match self.run(vm, vcpu, vec![answer.look()]) {
            Err(error) => not_entered(error),
            Ok(Exit::NeedPages { pool, .. }) => Outcome::Lacking(pool),
            Ok(_) => answer.outcome(),
        }
    }
}

/// The outcome for a guest whose vCPU was not entered.
fn not_entered(error: Error) -> Outcome {
    match error {
        Error::Busy => Outcome::Refused(Error::Busy),
        _ => Outcome::NotServed,
    }
}

/// What a guest finds in x0 and x1.
#[derive(Clone, Default)]
struct Answer(Arc<Mutex<[u64; 2]>>);

impl Answer {
    /// The guest looks, and an interrupt arrives.
    fn look(&self) -> Step {
        let answer = Arc::clone(&self.0);
        Box::new(move |context: &mut Context| {
            *answer.lock().expect("nobody fails here") = [context.x(0), context.x(1)];
            Trap::Irq
        })
    }

    fn outcome(&self) -> Outcome {
        match *self.0.lock().expect("nobody fails here") {
            [smccc::SUCCESS, done] => Outcome::Done(done),
            [smccc::NOT_SUPPORTED, _] => Outcome::NotServed,
            _ => Outcome::InvalidParameter,
        }
    }
}

/// Plays a pair once, under the schedule that shuttle is at.
fn play(pair: &Pair) {
    STORY.with_borrow_mut(Vec::clear);
    NOW.set(0);
    become_cpu(0);
    let stage = Arc::new(Stage::new(&pair.start));
    stage.fill_tlbs();
    stage.core().hyp.machine().interleave(true);
    let cpus: Vec<Box<dyn FnOnce() + Send>> = vec![
        by(&stage, 0, vec![pair.ops[0]], pair.start.vcpus[0]),
        by(&stage, 1, vec![pair.ops[1]], pair.start.vcpus[1]),
        by(&stage, 2, [2, 3, 2].map(|pfn| Op::Load { pfn }).to_vec(), 0),
    ];
    let cpus: Vec<_> = cpus.into_iter().map(shuttle::thread::spawn).collect();
    for cpu in cpus {
        cpu.join().expect("a CPU that fails has ended the execution");
    }
    stage.core().hyp.machine().interleave(false);
    stage.core().check();
    let story = STORY.with_borrow(Clone::clone);
    let ends = Search { story: &story }.ends(stage.state);
    assert!(!ends.is_empty(), "no order of these gives these outcomes");
    let differences: Vec<_> = ends.iter().map(|end| stage.real.compare(end, Some(&stage.state))).collect();
    if differences.iter().all(Result::is_err) {
        panic!("the outcomes are those of an order, but not the state: {differences:?}");
    }
}

/// What a CPU does.
fn by(stage: &Arc<Stage>, cpu: usize, ops: Vec<Op>, vcpu: u8) -> Box<dyn FnOnce() + Send> {
    let stage = Arc::clone(stage);
    Box::new(move || {
        become_cpu(cpu);
        ops.into_iter().for_each(|op| stage.perform(op.by(vcpu), vcpu));
    })
}

/// The search for an order.
struct Search<'a> {
    story: &'a [Event],
}

impl Search<'_> {
    /// The states after all orders that give the outcomes of the story.
    fn ends(&self, state: Small) -> Vec<Small> {
        let mut ends = Vec::new();
        self.go_on(state, &mut vec![false; self.story.len()], &mut ends);
        ends
    }

    fn go_on(&self, state: Small, done: &mut Vec<bool>, ends: &mut Vec<Small>) {
        if done.iter().all(|done| *done) {
            if !ends.contains(&state) {
                ends.push(state);
            }
            return;
        }
        let first_end = self.open(done).filter_map(|event| event.ended).map(|(end, _)| end).min();
        for (number, event) in self.story.iter().enumerate() {
            if done[number] || first_end.is_some_and(|end| event.began > end) {
                continue;
            }
            if let Some(next) = self.next(&state, event) {
                done[number] = true;
                self.go_on(next, done, ends);
                done[number] = false;
            }
        }
    }

    fn open<'a>(&'a self, done: &'a [bool]) -> impl Iterator<Item = &'a Event> {
        self.story.iter().zip(done).filter(|(_, done)| !**done).map(|(event, _)| event)
    }

    /// The state after an event that comes next, if its outcome is what the specification says.
    fn next(&self, state: &Small, event: &Event) -> Option<Small> {
        let (_, got) = event.ended?;
        if got == Got::Outcome(Outcome::Refused(Error::Busy)) && self.is_claimed(event) {
            return Some(*state);
        }
        match (event.op, got) {
            (Op::Load { pfn }, got) => {
                let page = &state.pages[pfn as usize];
                let fits = match got {
                    Got::Value(value) if page.host_state().is_accessible() => match page.content {
                        Content::Zeros => value == 0,
                        Content::Known => true,
                        Content::Secret => false,
                    },
                    Got::Value(_) => false,
                    Got::Outcome(_) => !page.host_state().is_accessible(),
                };
                fits.then_some(*state)
            }
            (Op::Enter { vm, vcpu }, Got::Outcome(got)) => {
                let lack = if let Outcome::Lacking(pool) = got { Some(pool) } else { None };
                let (outcome, next) = step(&WINDOW, state, Call::UnshareAck { vm, vcpu }, lack);
                let waits = state.vms[usize::from(vm)].pending[usize::from(vcpu)].is_some();
                let live = state.vms[usize::from(vm)].phase == Phase::Live;
                let fits = match (got, outcome) {
                    (Outcome::NotServed, _) => !live,
                    (Outcome::InvalidParameter, Outcome::Done(0)) => true,
                    _ if waits => got == outcome,
                    // Nothing was pending: the guest finds the answer of an earlier call.
                    _ => live,
                };
                fits.then_some(next)
            }
            (Op::Call(call), Got::Outcome(got)) => {
                let lack = if let Outcome::Lacking(pool) = got { Some(pool) } else { None };
                let (outcome, next) = step(&WINDOW, state, call, lack);
                (outcome == got).then_some(next)
            }
            (_, Got::Value(_)) => None,
        }
    }

    /// Whether a call that came to nothing because a vCPU was claimed had somebody to claim it meanwhile. The
    /// specification knows no claims: its calls take no time.
    fn is_claimed(&self, event: &Event) -> bool {
        let wanted = match event.op {
            Op::Call(Call::VmTeardownStart { vm }) => Some((vm, None)),
            op => op.claims(event.vcpu).map(|(vm, vcpu)| (vm, Some(vcpu))),
        };
        let Some((vm, vcpu)) = wanted else { return false };
        self.story.iter().filter(|other| other.cpu != event.cpu).any(|other| {
            let at_once = other.began < event.ended.map_or(usize::MAX, |(end, _)| end)
                && event.began < other.ended.map_or(usize::MAX, |(end, _)| end);
            let claims = other.op.claims(other.vcpu);
            at_once && claims.is_some_and(|claims| claims.0 == vm && vcpu.is_none_or(|vcpu| vcpu == claims.1))
        })
    }
}

/// Plays a pair under so many schedules, half of them random step by step, half with few changes of CPU.
///
/// # Errors
/// The story of the first that goes wrong.
pub fn explore(pair: &Pair, schedules: usize, seed: u64) -> Result<(), String> {
    let random = RandomScheduler::new_from_seed(seed, schedules / 2);
    let few = PctScheduler::new_from_seed(seed, DEPTH, schedules - schedules / 2);
    run(random, pair).and_then(|()| run(few, pair)).map_err(|what| {
        format!("{}\nto see it again: DEED_PAIR='{}' DEED_SEED={seed}", tell(pair, &what), pair.name())
    })
}

fn run(scheduler: impl Scheduler + 'static, pair: &Pair) -> Result<(), String> {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.silence_warnings = true;
    let of_this = *pair;
    let runner = shuttle::Runner::new(scheduler, config);
    let played = catch_unwind(AssertUnwindSafe(|| runner.run(move || play(&of_this))));
    played.map(drop).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "a panic".to_owned())
    })
}

/// Tells what happened, and what would have if it had been done one after the other.
fn tell(pair: &Pair, what: &str) -> String {
    let mut lines = vec![format!("from the state `{}`:", pair.start.name)];
    lines.extend(pair.start.calls.iter().map(|call| format!("    {call:?}")));
    lines.push("these were done at the same time, each from one moment to another:".to_owned());
    for Event { cpu, op, vcpu, began, ended } in STORY.with_borrow(Clone::clone) {
        let by = if op.claims(vcpu).is_some() { format!(" (vCPU {vcpu})") } else { String::new() };
        let end = match ended {
            Some((end, Got::Outcome(outcome))) => format!("{began:2} to {end:2}: {op:?}{by} -> {outcome:?}"),
            Some((end, Got::Value(value))) => format!("{began:2} to {end:2}: {op:?}{by} -> {value:#x}"),
            None => format!("{began:2} on:    {op:?}{by}"),
        };
        lines.push(format!("    CPU {cpu}, {end}"));
    }
    lines.push(what.to_owned());
    for [(first, by), (second, then)] in [[0, 1], [1, 0]].map(|order| order.map(|at| (pair.ops[at], at))) {
        let (one, state) = serial(&pair.state, first.by(pair.start.vcpus[by]));
        let (two, _) = serial(&state, second.by(pair.start.vcpus[then]));
        lines.push(format!("one after the other: {first:?} -> {one}; {second:?} -> {two}"));
    }
    lines.join("\n")
}
