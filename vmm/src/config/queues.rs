//! How many virtqueues a device has and how long they are.

use thiserror::Error;

/// Most virtqueues of one device.
pub const MAX_QUEUES: u32 = 256;

/// Longest virtqueue (virtio 1.3, 2.7): a split ring's index is 16 bits wide.
pub const MAX_QUEUE_SIZE: u32 = 32768;

/// Queues that no device can have. `device` is the word with what tells it from others of its kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum QueuesError {
    /// Too short, too long or not a power of two.
    #[error(
        "{device}: queue size out of range: queue_size={size}; give a power of two from 2 to \
         {MAX_QUEUE_SIZE}"
    )]
    Size {
        /// The device.
        device: String,
        /// The size asked for.
        size: u32,
    },
    /// None or too many.
    #[error("{device}: num_queues={count} is out of range: give 1 to {MAX_QUEUES}")]
    Count {
        /// The device.
        device: String,
        /// The number asked for.
        count: u32,
    },
    /// A queue without its other half.
    #[error(
        "{device}: num_queues={count}, but queues come in pairs, one to receive and one to \
         transmit: give an even number from 2 to {MAX_QUEUES}"
    )]
    Pairs {
        /// The device.
        device: String,
        /// The number asked for.
        count: u32,
    },
}

/// Checks the length of a device's queues.
pub(super) fn size(device: &str, size: u32) -> Result<u16, QueuesError> {
    if size.is_power_of_two()
        && (2..=MAX_QUEUE_SIZE).contains(&size)
        && let Ok(size) = u16::try_from(size)
    {
        return Ok(size);
    }
    let device = device.to_owned();
    Err(QueuesError::Size { device, size })
}

/// Checks the number of a device's queues.
pub(super) fn count(device: &str, count: u32) -> Result<u16, QueuesError> {
    match u16::try_from(count) {
        Ok(narrow) if (1..=MAX_QUEUES).contains(&count) => Ok(narrow),
        _ => Err(QueuesError::Count {
            device: device.to_owned(),
            count,
        }),
    }
}

/// Checks the number of a device's queues, which come in pairs, and tells how many pairs that are.
pub(super) fn pairs(device: &str, count: u32) -> Result<u16, QueuesError> {
    match u16::try_from(count / 2) {
        Ok(pairs) if count.is_multiple_of(2) && (2..=MAX_QUEUES).contains(&count) => Ok(pairs),
        _ => Err(QueuesError::Pairs {
            device: device.to_owned(),
            count,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_that_fit_a_ring() {
        for good in [2, 128, 256, 32768] {
            assert_eq!(size("--disk", good).map(u32::from), Ok(good));
        }
        for bad in [0, 1, 3, 100, 65536, u32::MAX] {
            let error = size("--disk path=/d", bad).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!(
                    "--disk path=/d: queue size out of range: queue_size={bad}"
                )),
                "{error}"
            );
        }
    }

    #[test]
    fn counts_have_bounds_and_pairs_are_even() {
        assert_eq!((count("d", 1), count("d", 256)), (Ok(1), Ok(256)));
        for bad in [0, 257, u32::MAX] {
            let error = count("--disk path=/d", bad).unwrap_err().to_string();
            assert!(error.contains("give 1 to 256"), "{error}");
        }
        assert_eq!((pairs("d", 2), pairs("d", 256)), (Ok(1), Ok(128)));
        for bad in [0, 1, 3, 258, u32::MAX] {
            let error = pairs("--net", bad).unwrap_err().to_string();
            assert!(error.contains("an even number from 2 to 256"), "{error}");
        }
    }
}
