//! Linux's error numbers, as far as the host returns them.

/// Why a system call failed; a program sees the negated number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[expect(missing_docs, reason = "the names are Linux's own (include/uapi/asm-generic/errno*.h)")]
pub enum Errno {
    EPERM = 1,
    ENOENT = 2,
    ESRCH = 3,
    EINTR = 4,
    EIO = 5,
    ENOEXEC = 8,
    EBADF = 9,
    EAGAIN = 11,
    ENOMEM = 12,
    EACCES = 13,
    EFAULT = 14,
    EBUSY = 16,
    EEXIST = 17,
    ENODEV = 19,
    EINVAL = 22,
    EMFILE = 24,
    ENOTTY = 25,
    EFBIG = 27,
    ESPIPE = 29,
    ERANGE = 34,
    ENAMETOOLONG = 36,
    ENOSYS = 38,
    EOPNOTSUPP = 95,
    ETIMEDOUT = 110,
    EHWPOISON = 133,
}

impl Errno {
    /// The value of x0 after a failed system call.
    pub const fn to_word(self) -> u64 {
        -(self as u16 as i64) as u64
    }
}

impl From<abi::Error> for Errno {
    fn from(error: abi::Error) -> Self {
        match error {
            abi::Error::Permission => Self::EPERM,
            abi::Error::NoEntry => Self::ENOENT,
            abi::Error::Again => Self::EAGAIN,
            abi::Error::NoMemory => Self::ENOMEM,
            abi::Error::Busy => Self::EBUSY,
            abi::Error::Exists => Self::EEXIST,
            abi::Error::Invalid => Self::EINVAL,
            abi::Error::Range => Self::ERANGE,
            abi::Error::Poisoned => Self::EHWPOISON,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_hypervisor_keep_their_numbers() {
        for error in abi::Error::ALL {
            assert_eq!(Errno::from(error).to_word(), error.to_word());
        }
    }
}
