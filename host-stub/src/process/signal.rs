//! Signals: actions, mask, and what a fault does to a program.
//!
//! Only signals that the program itself causes exist (Linux's `force_sig_fault`): if such a signal is
//! blocked or ignored, it kills all the same.

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
    pub const SIGSTOP: u32 = 19;
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

    /// A floating-point exception.
    pub const fn floating_point(address: u64) -> Self {
        Self { number: number::SIGFPE, code: 0, address }
    }
}

/// The signal state of a program.
#[derive(Clone, Debug)]
pub struct Signals {
    actions: [Action; number::LAST as usize],
    mask: u64,
}

impl Default for Signals {
    fn default() -> Self {
        Self { actions: [Action::default(); number::LAST as usize], mask: 0 }
    }
}

/// The bit of a signal in a mask.
const fn bit(number: u32) -> u64 {
    1u64.wrapping_shl(number.wrapping_sub(1))
}

const UNBLOCKABLE: u64 = bit(number::SIGKILL) | bit(number::SIGSTOP);

impl Signals {
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

    /// Signals that are blocked.
    pub fn mask(&self) -> u64 {
        self.mask
    }

    /// Sets them; SIGKILL and SIGSTOP are never blocked.
    pub fn set_mask(&mut self, mask: u64) {
        self.mask = mask & !UNBLOCKABLE;
    }

    /// Changes them: `how` is SIG_BLOCK (0), SIG_UNBLOCK (1) or SIG_SETMASK (2).
    pub fn change_mask(&mut self, how: u64, set: u64) -> Result<(), Errno> {
        let mask = match how {
            0 => self.mask | set,
            1 => self.mask & !set,
            2 => set,
            _ => return Err(Errno::EINVAL),
        };
        self.set_mask(mask);
        Ok(())
    }

    /// The handler that gets this signal, or `None` if it kills. A handler that is returned has its mask
    /// applied; the mask that its frame must restore is read before.
    pub fn deliver(&mut self, number: u32) -> Option<Action> {
        let action = self.action(number.into()).ok()?;
        if matches!(action.handler, SIG_DFL | SIG_IGN) || self.mask & bit(number) != 0 {
            return None;
        }
        let own = if action.flags & SA_NODEFER != 0 { 0 } else { bit(number) };
        self.set_mask(self.mask | action.mask | own);
        if action.flags & SA_RESETHAND != 0 {
            self.set_action(number.into(), Action { handler: SIG_DFL, ..action }).ok()?;
        }
        Some(action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handled() -> Signals {
        let mut signals = Signals::default();
        let action = Action { handler: 0x40_0000, flags: SA_SIGINFO, restorer: 0, mask: 0 };
        signals.set_action(7, action).unwrap();
        signals
    }

    #[test]
    fn a_signal_is_blocked_in_its_handler_and_then_kills() {
        let mut signals = handled();
        assert!(signals.deliver(7).is_some());
        assert_eq!(signals.mask(), 1 << 6);
        assert!(signals.deliver(7).is_none());
        signals.change_mask(1, 1 << 6).unwrap();
        assert!(signals.deliver(7).is_some());
    }

    #[test]
    fn without_a_handler_it_kills() {
        let mut signals = Signals::default();
        assert_eq!(signals.deliver(number::SIGSEGV), None);
        signals.set_action(11, Action { handler: 1, ..Action::default() }).unwrap();
        assert_eq!(signals.deliver(number::SIGSEGV), None);
    }

    #[test]
    fn flags_of_the_action_hold() {
        let mut signals = handled();
        let action = signals.action(7).unwrap();
        signals.set_action(7, Action { flags: SA_NODEFER | SA_RESETHAND, mask: 1 << 10, ..action }).unwrap();
        assert!(signals.deliver(7).is_some());
        assert_eq!(signals.mask(), 1 << 10);
        assert_eq!(signals.deliver(7), None);
    }

    #[test]
    fn kill_and_stop_have_no_handler_and_no_mask() {
        let mut signals = Signals::default();
        assert_eq!(signals.set_action(9, Action::default()), Err(Errno::EINVAL));
        assert_eq!(signals.set_action(0, Action::default()), Err(Errno::EINVAL));
        assert_eq!(signals.set_action(65, Action::default()), Err(Errno::EINVAL));
        signals.set_mask(u64::MAX);
        assert_eq!(signals.mask() & UNBLOCKABLE, 0);
        assert_eq!(signals.change_mask(3, 0), Err(Errno::EINVAL));
    }

    #[test]
    fn an_action_survives_its_bytes() {
        let action = Action { handler: 1, flags: 2, restorer: 3, mask: 4 };
        assert_eq!(Action::from_bytes(&action.to_bytes()), action);
    }
}
