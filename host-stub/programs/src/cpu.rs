//! Another CPU of the host's: the kernel lets it play a series while this program goes on.

use core::fmt;

use crate::deed::{Deed, Touch};
use crate::series::Series;
use crate::uapi::deed;
use crate::{Failure, failure, sys};

/// Nanoseconds in which a CPU that spins must notice what happens to its page.
pub const PATIENCE: u64 = 3_000_000_000;
/// Rounds after which a CPU that spins has surely seen its page.
pub const WARM: u64 = 100;

/// A CPU that is on.
#[derive(Debug)]
pub struct Cpu<'d> {
    deed: &'d Deed,
    number: u64,
    series: Series,
}

/// How far a series was played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// It is being played.
    pub playing: bool,
    /// Rounds played to their end.
    pub rounds: u64,
    /// Aborts taken.
    pub aborts: u64,
}

/// What became of a CPU that spins on a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spun {
    /// An access of it came to this, and was its last.
    Ended(Touch),
    /// It went on and on: this many rounds after it should have ended.
    GoesOn(u64),
}

impl Spun {
    /// Whether it ended with the abort that Deed injects.
    pub fn is_injected_abort(&self, at: u64) -> bool {
        matches!(self, Self::Ended(touch) if touch.is_injected_abort(at))
    }
}

impl fmt::Display for Spun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(touch) => write!(f, "{touch}"),
            Self::GoesOn(rounds) => write!(f, "{rounds} more accesses"),
        }
    }
}

impl<'d> Cpu<'d> {
    /// Number of CPUs; the first is the one that runs programs.
    pub fn count(deed: &Deed) -> Result<u64, Failure> {
        let mut count = [0];
        deed.request("DEED_CPUS", deed::CPUS, &mut count)?;
        Ok(count[0])
    }

    /// Turns one on.
    pub fn on(deed: &'d Deed, number: u64) -> Result<Self, Failure> {
        deed.request("DEED_CPU_ON", deed::CPU_ON, &mut [number])?;
        Ok(Self { deed, number, series: Series::default() })
    }

    /// Turns it off.
    pub fn off(self) -> Result<(), Failure> {
        self.deed.request("DEED_CPU_OFF", deed::CPU_OFF, &mut [self.number])
    }

    /// The series that it plays.
    pub fn series(&mut self) -> &mut Series {
        &mut self.series
    }

    /// Lets it play that series: so many rounds, or, if that is 0, until it is told to end. An abort ends it unless it
    /// is to go on past them.
    pub fn play(&mut self, rounds: u64, past_aborts: bool) -> Result<(), Failure> {
        let [address, count] = self.series.argument();
        let mut argument = [self.number, address, count, rounds, u64::from(past_aborts)];
        self.deed.request("DEED_CPU_PLAY", deed::CPU_PLAY, &mut argument)
    }

    /// How far it is.
    pub fn progress(&self) -> Result<Progress, Failure> {
        let mut argument = [self.number, 0, 0, 0];
        self.deed.request("DEED_CPU_PROGRESS", deed::CPU_PROGRESS, &mut argument)?;
        let [_, state, rounds, aborts] = argument;
        Ok(Progress { playing: state == deed::CPU_PLAYING, rounds, aborts })
    }

    /// Waits until it has played its series, or, if not `all` of it, until it has ended its round. What came of the
    /// records is then in the series.
    pub fn end(&mut self, all: bool) -> Result<Progress, Failure> {
        let [address, count] = self.series.argument();
        let mut argument = [self.number, address, count, u64::from(all), 0, 0];
        self.deed.request("DEED_CPU_END", deed::CPU_END, &mut argument)?;
        let [.., rounds, aborts] = argument;
        Ok(Progress { playing: false, rounds, aborts })
    }

    /// Lets it load from an address, or store to it, for ever. Returns when it has done so for some time.
    pub fn spin(&mut self, address: u64, store: Option<u64>) -> Result<(), Failure> {
        self.series.clear();
        match store {
            None => self.series.load(address),
            Some(value) => self.series.store(address, value),
        };
        self.play(0, false)?;
        let warm = self.until(|progress| progress.rounds >= WARM || !progress.playing)?;
        if warm.playing { Ok(()) } else { Err(failure!("CPU {} cannot reach {address:#x}", self.number)) }
    }

    /// Whether it goes on as it did: it makes more rounds.
    pub fn goes_on(&self) -> Result<bool, Failure> {
        let before = self.progress()?;
        let after = self.until(|progress| progress.rounds >= before.rounds + WARM || !progress.playing)?;
        Ok(after.playing && after.rounds >= before.rounds + WARM)
    }

    /// What becomes of it when the page that it spins on has gone.
    pub fn spun(&mut self) -> Result<Spun, Failure> {
        let before = self.progress()?;
        let after = self.until(|progress| !progress.playing)?;
        let more = self.end(false)?.rounds - before.rounds;
        Ok(if after.playing { Spun::GoesOn(more) } else { Spun::Ended(self.series.touched(0)) })
    }

    fn until(&self, holds: impl Fn(Progress) -> bool) -> Result<Progress, Failure> {
        let limit = sys::now() + PATIENCE;
        loop {
            let progress = self.progress()?;
            if holds(progress) || sys::now() > limit {
                return Ok(progress);
            }
        }
    }
}
