//! Two CPUs that make a call each at the same time, and a third that touches the pages meanwhile, under a schedule
//! that shuttle decides.
//!
//! A CPU can be stopped before each operation of the [`Machine`](hyp::machine::Machine), each lock and each atomic,
//! and another goes on. Afterwards there must be an order of all that was done, one after the other, in which the
//! specification gives the same outcomes and the same state; and what ended before something else began comes first
//! in it.

mod power;
mod search;
mod stage;

pub use power::turn_a_cpu_on_from_two;

use crate::real::Real;
use hyp::testing::become_cpu;
use search::Search;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use spec::{Call, Outcome, State, step};
use stage::Stage;
use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

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

/// The state of the world.
pub type Small = State<P, V, G>;

type Core = Real<P, V, G>;

/// Points of a schedule at which [`PctScheduler`] may stop a CPU that it favours, plus one.
const DEPTH: usize = 4;

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

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call) => call.fmt(f),
            Self::Enter { vm, vcpu } => write!(f, "VCPU_RUN of vCPU {vcpu} of VM {vm}"),
            Self::Load { pfn } => write!(f, "host's load from page {pfn}"),
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
            assert!(!outcome.is_refusal(), "{}: {call} is refused: {outcome}", self.name);
            state = next;
        }
        state
    }
}

/// Two operations, from a start.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Numbers of its operations.
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

    /// Whether it matters who comes first, for what they are told or for what is then, or both change something.
    pub fn is_relevant(&self) -> bool {
        let ([a, b], [of_a, of_b]) = (self.ops, self.start.vcpus);
        let (a_first, then) = serial(&self.state, a, of_a);
        let (b_second, end) = serial(&then, b, of_b);
        let (b_first, other) = serial(&self.state, b, of_b);
        let (a_second, other_end) = serial(&other, a, of_a);
        let matters = a_first != a_second || b_first != b_second || end != other_end;
        matters || then != self.state && other != self.state
    }
}

/// The state in which a guest that `op` runs is entered: an unshare that its vCPU waits for is settled by then.
fn settled(state: &Small, op: Op, vcpu: u8) -> Small {
    match (op, op.claims(vcpu)) {
        (Op::Call(Call::UnshareAck { .. }) | Op::Enter { .. }, _) | (_, None) => *state,
        (_, Some((vm, vcpu))) => step(&WINDOW, state, Call::UnshareAck { vm, vcpu }, None).1,
    }
}

/// What the specification says of an operation by a CPU that runs a guest's `vcpu` if it runs one.
fn serial(state: &Small, op: Op, vcpu: u8) -> (String, Small) {
    let state = &settled(state, op, vcpu);
    match op.by(vcpu) {
        Op::Call(call) => {
            let (outcome, next) = step(&WINDOW, state, call, None);
            (outcome.to_string(), next)
        }
        Op::Enter { vm, vcpu } => {
            let (outcome, next) = step(&WINDOW, state, Call::UnshareAck { vm, vcpu }, None);
            (outcome.to_string(), next)
        }
        Op::Load { pfn } => {
            let page = &state.pages[pfn as usize];
            let found = page.host_state().is_accessible().then_some(page.content);
            (format!("{found:?}"), *state)
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
    let differences: Vec<_> = ends.iter().map(|end| stage.real.compare(end, None)).collect();
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

/// Plays a pair under so many schedules, half of them random step by step, half with few changes of CPU.
///
/// # Errors
/// The story of the first that goes wrong.
pub fn explore(pair: &Pair, schedules: usize, seed: u64) -> Result<(), String> {
    let random = RandomScheduler::new_from_seed(seed, schedules / 2);
    let few = PctScheduler::new_from_seed(seed, DEPTH, schedules - schedules / 2);
    let (one, other) = (*pair, *pair);
    let played = run(random, move || play(&one)).and_then(|()| run(few, move || play(&other)));
    played.map_err(|what| {
        format!("{}\nto see it again: DEED_PAIR='{}' DEED_SEED={seed}", tell(pair, &what), pair.name())
    })
}

/// Plays what is no pair of the specification's calls, under so many schedules, as [`explore`] does.
///
/// # Errors
/// What the first that goes wrong says.
pub fn under_schedules(play: fn(), schedules: usize, seed: u64) -> Result<(), String> {
    let half = schedules / 2;
    run(RandomScheduler::new_from_seed(seed, schedules - half), play)?;
    run(PctScheduler::new_from_seed(seed, DEPTH, half), play)
}

fn run(scheduler: impl Scheduler + 'static, play: impl Fn() + Send + Sync + 'static) -> Result<(), String> {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.silence_warnings = true;
    let runner = shuttle::Runner::new(scheduler, config);
    let played = catch_unwind(AssertUnwindSafe(|| runner.run(play)));
    played.map(drop).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "a panic".to_owned())
    })
}

/// Tells what happened, and what would have if it had been done one after the other.
fn tell(pair: &Pair, what: &str) -> String {
    let mut lines = vec![format!("from the state `{}`:", pair.start.name)];
    lines.extend(pair.start.calls.iter().map(|call| format!("    {call}")));
    lines.push("these were done at the same time, each from one moment to another:".to_owned());
    for Event { cpu, op, vcpu, began, ended } in STORY.with_borrow(Clone::clone) {
        let by = if op.claims(vcpu).is_some() { format!(" (vCPU {vcpu})") } else { String::new() };
        let end = match ended {
            Some((end, Got::Outcome(outcome))) => format!("{began:2} to {end:2}: {op}{by} -> {outcome}"),
            Some((end, Got::Value(value))) => format!("{began:2} to {end:2}: {op}{by} -> {value:#x}"),
            None => format!("{began:2} on:    {op}{by}"),
        };
        lines.push(format!("    CPU {cpu}, {end}"));
    }
    lines.push(what.to_owned());
    for [(first, by), (second, then)] in [[0, 1], [1, 0]].map(|order| order.map(|at| (pair.ops[at], at))) {
        let (one, state) = serial(&pair.state, first, pair.start.vcpus[by]);
        let (two, _) = serial(&state, second, pair.start.vcpus[then]);
        lines.push(format!("one after the other: {first} -> {one}; {second} -> {two}"));
    }
    lines.join("\n")
}
