//! The real core and the specification, played call by call and compared after each.

use crate::real::Real;
use spec::state::HostEntry;
use spec::{Call, Outcome, State, step};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Once;

/// What was seen, and the difference that ended it.
#[derive(Debug, Default)]
pub struct Told {
    /// The calls, each with its outcome.
    pub story: Vec<String>,
    /// The difference.
    pub difference: Option<String>,
    /// How often the core lacked pages.
    pub lacks: u64,
    /// How often an allocation was made to fail.
    pub failures: u64,
    /// How often each outcome of each call was seen.
    pub pairs: BTreeMap<(&'static str, &'static str), u64>,
}

/// The core and the specification, in what must be the same state.
#[derive(Debug)]
pub struct Pair<const P: usize, const V: usize, const G: usize> {
    real: Real<P, V, G>,
    state: State<P, V, G>,
    /// Each allocation of each call fails once.
    failing: bool,
    /// What was seen.
    pub told: Told,
}

impl<const P: usize, const V: usize, const G: usize> Pair<P, V, G> {
    /// Both at boot: see [`Real::new`].
    pub fn new(poor: bool, gfn: u64) -> Self {
        Self { real: Real::new(poor, gfn), state: State::new(), failing: false, told: Told::default() }
    }

    /// The state, as the specification has it.
    pub fn state(&self) -> &State<P, V, G> {
        &self.state
    }

    /// Where the world lies.
    pub fn place(&self) -> &spec::World {
        self.real.place()
    }

    /// From now on each allocation of each call fails once, or none does.
    pub fn fail_allocations(&mut self, failing: bool) {
        self.failing = failing;
    }

    /// Lets all TLBs hold whatever they may.
    pub fn load_all(&self) {
        self.real.load_all();
    }

    /// Makes a call on both. What the core lacks is given, and the call made again: it must not lack the same
    /// another time.
    fn play(&mut self, call: Call) -> Result<(), String> {
        let mut lacked = Vec::new();
        loop {
            let real = if self.failing { self.play_with_failures(call)? } else { self.real.play(call) };
            let lack = match real {
                Outcome::Lacking(pool) => Some(pool),
                _ => None,
            };
            let (expected, next) = step(self.real.place(), &self.state, call, lack);
            self.told.story.push(format!("{call} -> {real}"));
            if real != expected {
                return Err(format!("the specification says: {expected}"));
            }
            let pair = (spec::call::CALLS[call.kind()], spec::call::OUTCOMES[real.kind()]);
            *self.told.pairs.entry(pair).or_default() += 1;
            let before = std::mem::replace(&mut self.state, next);
            self.real.compare(&self.state, Some(&before))?;
            let Some(pool) = lack else { return Ok(()) };
            if lacked.contains(&pool) {
                return Err("what was asked for was given, and it lacks the same again".to_owned());
            }
            lacked.push(pool);
            self.told.lacks += 1;
            self.real.serve_lack(pool, vm_of(call, &self.state));
            self.real.compare(&self.state, Some(&next))?;
        }
    }

    /// Makes a call on the core, after it has failed for each of its allocations and left everything as it was.
    fn play_with_failures(&mut self, call: Call) -> Result<Outcome, String> {
        for k in 1.. {
            self.real.core().fail_allocation(k);
            let real = self.real.play(call);
            let Some(pool) = self.real.core().stop_failing() else { return Ok(real) };
            self.told.failures += 1;
            self.told.story.push(format!("{call} -> {real}, since allocation {k} fails"));
            let (expected, next) = step(self.real.place(), &self.state, call, Some(pool));
            if real != expected {
                return Err(format!("the specification says: {expected}"));
            }
            self.real.compare(&next, Some(&self.state))?;
            self.state = next;
        }
        Err("its allocations have no end".to_owned())
    }

    /// Compares everything, also what is in pages that no call has changed.
    pub fn end(&mut self) {
        if self.told.difference.is_none() {
            self.told.difference = self.real.compare(&self.state, None).err();
        }
    }

    /// Makes a call on both; a panic is told as a difference too. Returns whether it goes on.
    pub fn goes_on(&mut self, call: Call) -> bool {
        let played = quietly(|| self.play(call));
        self.told.difference = match played {
            Ok(Ok(())) => None,
            Ok(Err(difference)) => Some(difference),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                self.told.story.push(format!("{call}"));
                Some(text.unwrap_or_else(|| "a panic".to_owned()))
            }
        };
        if let Some(difference) = &mut self.told.difference {
            let spec::World { pfn, gfn, .. } = self.real.place();
            difference.push_str(&format!("\n(page 0 is {pfn:#x}, guest page 0 is {gfn:#x})"));
        }
        self.told.difference.is_none()
    }
}

/// Does what may panic, without what a panic prints: it is told with the story, and a story is played many times until
/// it is a short one.
fn quietly<T>(what: impl FnOnce() -> T) -> std::thread::Result<T> {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what));
    QUIET.set(false);
    done
}

/// The VM that a call is about.
fn vm_of<const P: usize, const V: usize, const G: usize>(call: Call, state: &State<P, V, G>) -> Option<u8> {
    match call {
        Call::ForceReclaim { pfns } => match state.pages.get(pfns.first as usize)?.host {
            HostEntry::Guest { vm, .. } => Some(vm),
            _ => None,
        },
        call => call.vm(),
    }
}
