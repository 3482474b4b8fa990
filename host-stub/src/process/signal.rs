//! Signals: what a program does about them, which of them a thread blocks, and what becomes of one.
//!
//! A signal that a thread causes itself (Linux's `force_sig_fault`) kills if it is blocked or ignored. One that was sent
//! (`tgkill`) waits while it is blocked, and is forgotten if it is ignored.

use crate::errno::Errno;

/// Numbers of signals.
#[expect(missing_docs, reason = "Linux's own names")]
pub mod number {
    pub const SIGILL: u32 = 4;
    pub const SIGTRAP: u32 = 5;
    pub const SIGBUS: u32 = 7;
    pub const SIGFPE: u32 = 8;
    pub const SIGKILL: u32 = 9;
    pub const SIGSEGV: u32 = 11;
    pub const SIGCHLD: u32 = 17;
    pub const SIGCONT: u32 = 18;
    pub const SIGSTOP: u32 = 19;
    pub const SIGURG: u32 = 23;
    pub const SIGWINCH: u32 = 28;
    pub const LAST: u32 = 64;
}

/// `SA_SIGINFO`.
pub const SA_SIGINFO: u64 = 4;
/// `SA_RESTORER`.
pub const SA_RESTORER: u64 = 0x0400_0000;
/// `SA_NODEFER`.
pub const SA_NODEFER: u64 = 0x4000_0000;
/// `SA_RESETHAND`.
pub const SA_RESETHAND: u64 = 0x8000_0000;
const SIG_DFL: u64 = 0;
const SIG_IGN: u64 = 1;

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Action {
    /// `SIG_DFL`, `SIG_IGN` or an address.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Where the handler returns to, with `SA_RESTORER`.
    pub restorer: u64,
    /// Signals blocked meanwhile.
    pub mask: u64,
}

impl Action {
    /// Bytes of the structure.
    pub const SIZE: usize = 32;

    /// Reads the structure.
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut next = || words.next().unwrap_or(0);
        Self { handler: next(), flags: next(), restorer: next(), mask: next() }
    }

    /// Writes the structure.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let words = [self.handler, self.flags, self.restorer, self.mask];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }
}

/// A signal with what `siginfo` says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub number: u32,
    /// `si_code`.
    pub code: i32,
    /// `si_addr`.
    pub address: u64,
}

impl Signal {
    /// No mapping there.
    pub const fn no_mapping(address: u64) -> Self {
        Self { number: number::SIGSEGV, code: 1, address }
    }

    /// The mapping does not allow it.
    pub const fn denied(address: u64) -> Self {
        Self { number: number::SIGSEGV, code: 2, address }
    }

    /// Nothing behind the mapping (`BUS_ADRERR`).
    pub const fn nothing_there(address: u64) -> Self {
        Self { number: number::SIGBUS, code: 2, address }
    }

    /// The memory system refused (`BUS_OBJERR`), as for a synchronous external abort.
    pub const fn refused(address: u64) -> Self {
        Self { number: number::SIGBUS, code: 3, address }
    }

    /// An unaligned access (`BUS_ADRALN`).
    pub const fn unaligned(address: u64) -> Self {
        Self { number: number::SIGBUS, code: 1, address }
    }

    /// An undefined instruction (`ILL_ILLOPC`).
    pub const fn undefined(address: u64) -> Self {
        Self { number: number::SIGILL, code: 1, address }
    }

    /// A breakpoint (`TRAP_BRKPT`).
    pub const fn breakpoint(address: u64) -> Self {
        Self { number: number::SIGTRAP, code: 1, address }
    }

    /// One that thread `sender`'s program sent (`SI_TKILL`); `si_pid` stands where other signals have their address.
    pub const fn sent(number: u32, sender: u64) -> Self {
        Self { number, code: -6, address: sender }
    }

    /// A floating-point exception.
    pub const fn floating_point(address: u64) -> Self {
        Self { number: number::SIGFPE, code: 0, address }
    }
}

/// The bit of a signal in a mask.
const fn bit(number: u32) -> u64 {
    1u64.wrapping_shl(number.wrapping_sub(1))
}

const UNBLOCKABLE: u64 = bit(number::SIGKILL) | bit(number::SIGSTOP);
/// Signals about which nothing is done by default.
const IGNORED_BY_DEFAULT: u64 =
    bit(number::SIGCHLD) | bit(number::SIGCONT) | bit(number::SIGURG) | bit(number::SIGWINCH);

/// The signals that a thread blocks, and those that were sent to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadSignals {
    blocked: u64,
    pending: u64,
}

impl ThreadSignals {
    /// Signals that are blocked.
    pub fn blocked(&self) -> u64 {
        self.blocked
    }

    /// Sets them; SIGKILL and SIGSTOP are never blocked.
    pub fn set_blocked(&mut self, blocked: u64) {
        self.blocked = blocked & !UNBLOCKABLE;
    }

    /// Changes them: `how` is SIG_BLOCK (0), SIG_UNBLOCK (1) or SIG_SETMASK (2).
    pub fn change_blocked(&mut self, how: u64, set: u64) -> Result<(), Errno> {
        let blocked = match how {
            0 => self.blocked | set,
            1 => self.blocked & !set,
            2 => set,
            _ => return Err(Errno::EINVAL),
        };
        self.set_blocked(blocked);
        Ok(())
    }

    /// What a new thread of this one's begins with: nothing was sent to it.
    pub fn inherited(&self) -> Self {
        Self { blocked: self.blocked, pending: 0 }
    }

    /// A signal is sent. EINVAL if there is no such signal.
    pub fn send(&mut self, number: u64) -> Result<(), Errno> {
        let number = u32::try_from(number).ok().filter(|number| (1..=number::LAST).contains(number));
        self.pending |= bit(number.ok_or(Errno::EINVAL)?);
        Ok(())
    }

    /// Whether a signal is pending that is not blocked.
    pub fn has_deliverable(&self) -> bool {
        self.pending & !self.blocked != 0
    }

    /// Whether a signal is blocked.
    pub fn blocks(&self, number: u64) -> bool {
        u32::try_from(number).is_ok_and(|number| self.blocked & bit(number) != 0)
    }

    /// Takes the lowest signal that is pending and not blocked.
    fn take(&mut self) -> Option<u32> {
        let number = (self.pending & !self.blocked).trailing_zeros().wrapping_add(1);
        if number > number::LAST {
            return None;
        }
        self.pending &= !bit(number);
        Some(number)
    }
}

/// What becomes of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// This handler gets it.
    Handled(Action),
    /// It is forgotten.
    Ignored,
    /// It ends the program.
    Kills,
}

/// What a program does about each signal.
#[derive(Clone, Debug)]
pub struct Actions {
    actions: [Action; number::LAST as usize],
}

impl Default for Actions {
    fn default() -> Self {
        Self { actions: [Action::default(); number::LAST as usize] }
    }
}

impl Actions {
    /// The action of a signal. EINVAL if there is no such signal.
    pub fn action(&self, number: u64) -> Result<Action, Errno> {
        let index =
            number.checked_sub(1).and_then(|index| usize::try_from(index).ok()).ok_or(Errno::EINVAL)?;
        self.actions.get(index).copied().ok_or(Errno::EINVAL)
    }

    /// Sets it. EINVAL also for SIGKILL and SIGSTOP.
    pub fn set_action(&mut self, number: u64, action: Action) -> Result<(), Errno> {
        if number == number::SIGKILL.into() || number == number::SIGSTOP.into() {
            return Err(Errno::EINVAL);
        }
        let index =
            number.checked_sub(1).and_then(|index| usize::try_from(index).ok()).ok_or(Errno::EINVAL)?;
        *self.actions.get_mut(index).ok_or(Errno::EINVAL)? = action;
        Ok(())
    }

    /// Whether nothing is done about a signal.
    pub fn ignores(&self, number: u64) -> bool {
        let idle = u32::try_from(number).is_ok_and(|number| IGNORED_BY_DEFAULT & bit(number) != 0);
        self.action(number)
            .is_ok_and(|action| action.handler == SIG_IGN || (action.handler == SIG_DFL && idle))
    }

    /// The handler that gets a signal which the thread has caused, or `None` if it kills. A handler that is returned has
    /// its mask applied; the mask that its frame must restore is read before.
    pub fn force(&mut self, signals: &mut ThreadSignals, number: u32) -> Option<Action> {
        match self.fate(signals, number) {
            Fate::Handled(action) => Some(action),
            Fate::Ignored | Fate::Kills => None,
        }
    }

    /// Takes the next signal that can be delivered, and says what becomes of it. The mask of a handler is applied, as by
    /// [`Actions::force`].
    pub fn next_sent(&mut self, signals: &mut ThreadSignals) -> Option<(u32, Fate)> {
        let number = signals.take()?;
        Some((number, self.fate(signals, number)))
    }

    fn fate(&mut self, signals: &mut ThreadSignals, number: u32) -> Fate {
        let Ok(action) = self.action(number.into()) else { return Fate::Kills };
        if self.ignores(number.into()) {
            return Fate::Ignored;
        }
        if action.handler == SIG_DFL || signals.blocked & bit(number) != 0 {
            return Fate::Kills;
        }
        let own = if action.flags & SA_NODEFER != 0 { 0 } else { bit(number) };
        signals.set_blocked(signals.blocked | action.mask | own);
        if action.flags & SA_RESETHAND != 0 {
            // A signal that has a handler may have another.
            let _ = self.set_action(number.into(), Action { handler: SIG_DFL, ..action });
        }
        Fate::Handled(action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handled() -> (Actions, ThreadSignals) {
        let mut actions = Actions::default();
        let action = Action { handler: 0x40_0000, flags: SA_SIGINFO, restorer: 0, mask: 0 };
        actions.set_action(7, action).unwrap();
        (actions, ThreadSignals::default())
    }

    #[test]
    fn a_signal_is_blocked_in_its_handler_and_then_kills() {
        let (mut actions, mut signals) = handled();
        assert!(actions.force(&mut signals, 7).is_some());
        assert_eq!(signals.blocked(), 1 << 6);
        assert!(actions.force(&mut signals, 7).is_none());
        signals.change_blocked(1, 1 << 6).unwrap();
        assert!(actions.force(&mut signals, 7).is_some());
    }

    #[test]
    fn without_a_handler_it_kills() {
        let (mut actions, mut signals) = (Actions::default(), ThreadSignals::default());
        assert_eq!(actions.force(&mut signals, number::SIGSEGV), None);
        actions.set_action(11, Action { handler: SIG_IGN, ..Action::default() }).unwrap();
        assert_eq!(actions.force(&mut signals, number::SIGSEGV), None);
    }

    #[test]
    fn flags_of_the_action_hold() {
        let (mut actions, mut signals) = handled();
        let action = actions.action(7).unwrap();
        actions.set_action(7, Action { flags: SA_NODEFER | SA_RESETHAND, mask: 1 << 10, ..action }).unwrap();
        assert!(actions.force(&mut signals, 7).is_some());
        assert_eq!(signals.blocked(), 1 << 10);
        assert_eq!(actions.force(&mut signals, 7), None);
    }

    #[test]
    fn kill_and_stop_have_no_handler_and_no_mask() {
        let (mut actions, mut signals) = (Actions::default(), ThreadSignals::default());
        for number in [0, 9, 65] {
            assert_eq!(actions.set_action(number, Action::default()), Err(Errno::EINVAL));
        }
        signals.set_blocked(u64::MAX);
        assert_eq!(signals.blocked() & UNBLOCKABLE, 0);
        assert_eq!(signals.change_blocked(3, 0), Err(Errno::EINVAL));
    }

    #[test]
    fn a_signal_that_is_sent_waits_while_it_is_blocked() {
        let (mut actions, mut signals) = handled();
        signals.set_blocked(1 << 6);
        signals.send(7).unwrap();
        assert_eq!((signals.has_deliverable(), actions.next_sent(&mut signals)), (false, None));
        assert_eq!(signals.inherited().pending, 0);
        signals.set_blocked(0);
        assert!(signals.has_deliverable());
        assert!(matches!(actions.next_sent(&mut signals), Some((7, Fate::Handled(_)))));
        signals.set_blocked(0);
        assert_eq!(actions.next_sent(&mut signals), None);
        for number in [0, 65, u64::MAX] {
            assert_eq!(signals.send(number), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn a_signal_without_handler_kills_unless_it_is_ignored_or_idle() {
        let (mut actions, mut signals) = handled();
        actions.set_action(10, Action { handler: SIG_IGN, ..Action::default() }).unwrap();
        for number in [64, 17, 10] {
            signals.send(number).unwrap();
        }
        assert_eq!(actions.next_sent(&mut signals), Some((10, Fate::Ignored)));
        assert_eq!(actions.next_sent(&mut signals), Some((17, Fate::Ignored)));
        assert_eq!(actions.next_sent(&mut signals), Some((64, Fate::Kills)));
    }

    #[test]
    fn an_action_survives_its_bytes() {
        let action = Action { handler: 1, flags: 2, restorer: 3, mask: 4 };
        assert_eq!(Action::from_bytes(&action.to_bytes()), action);
    }
}
